"""Compare two runs: recipe, data, versions, what each layer kept and lost, evaluation."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from actors.storage.files import Directory
from actors.storage.records import Record, read_records
from orchestrator.rundir.finished import finished_report
from planners.errors import StorageError
from planners.units.kinds import DONE, kind_of, layer_of

DATA = ("model revision", "tokenizer files", "calibration data", "evaluation data")
PLACES = ("out",)  # recipe keys that two runs never share


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A value that differs between two runs; None if a run does not have it (yet)."""

    what: str
    a: object
    b: object


def differences(a: Directory, b: Directory) -> dict[str, list[Difference]]:
    """Return section -> differences; an empty list if there are none.

    Unfinished runs are compared as far as they are: layers by their records.

    Raises:
        StorageError: one of them is not a run, or its plan or recipe is incomplete or corrupt.
    """
    first, second = _facts(a), _facts(b)
    return {name: _between(first[name], second[name]) for name in first}


def _facts(run: Directory) -> dict[str, dict[str, object]]:
    plan = _json(run, "plan.json")
    identity = plan.get("identity")
    report = finished_report(run) or {}
    records = read_records(run)
    if not isinstance(identity, dict):
        raise StorageError(f"{run.path('plan.json')}: is incomplete or corrupt")
    return {
        "recipe": _flat(_recipe(run)),
        "data": {key: identity.get(key) for key in DATA},
        "versions": _flat(_json(run, "environment.json")),
        "layers": _layers(report, records),
        "evaluation": _flat(
            {key: report.get(key) for key in ("parameters", "evaluation", "bytes")}
        ),
    }


def _layers(report: Mapping[str, Any], records: Mapping[str, Record]) -> dict[str, object]:
    """Return what each layer kept and lost, from the report or an unfinished run's records."""
    if report:
        rows = {f"layer {row['layer']}": row for row in report["layers"]}
        kept = {
            n: {k: row.get(k) for k in ("widths", "error", "errors")} for n, row in rows.items()
        }
        sites = {
            f"site {row['site']}": {k: row.get(k) for k in ("keep_dim", "energy_kept")}
            for row in report["sites"]
        }
        return _flat({**kept, **sites})
    found = {}
    for name, record in sorted(records.items()):
        kind = kind_of(name)
        if kind is not None and kind.state == DONE:
            lost = {k: record.values[k] for k in ("error", "errors") if k in record.values}
            found[f"layer {layer_of(name)}"] = lost
    return _flat(found)


def _between(a: Mapping[str, object], b: Mapping[str, object]) -> list[Difference]:
    names = dict.fromkeys([*a, *b])
    return [
        Difference(what=name, a=a.get(name), b=b.get(name))
        for name in names
        if a.get(name) != b.get(name)
    ]


def _flat(value: Mapping[Any, Any], prefix: str = "") -> dict[str, object]:
    """Return dotted key -> value of nested mappings."""
    found: dict[str, object] = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        if isinstance(inner, Mapping):
            found |= _flat(inner, f"{name}.")
        else:
            found[name] = inner
    return found


def _recipe(run: Directory) -> dict[str, object]:
    try:
        recipe = yaml.safe_load(run.read("run.yaml"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StorageError(f"{run.path('run.yaml')}: is incomplete or corrupt") from error
    if not isinstance(recipe, dict):
        raise StorageError(f"{run.path('run.yaml')}: is incomplete or corrupt")
    return {key: value for key, value in recipe.items() if key not in PLACES}


def _json(run: Directory, name: str) -> dict[str, Any]:
    if run.size(name) is None:
        raise StorageError(f"{run.uri}: there is no run here", hint="pass the --out of a run")
    try:
        found = json.loads(run.read(name))
    except ValueError as error:
        raise StorageError(f"{run.path(name)}: is incomplete or corrupt") from error
    if not isinstance(found, dict):
        raise StorageError(f"{run.path(name)}: is incomplete or corrupt")
    return found
