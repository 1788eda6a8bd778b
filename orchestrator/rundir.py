"""Opening a run directory, knowing another run from this one, and marking the end."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from actors.storage.files import Directory
from actors.storage.records import sealed
from actors.storage.tokens import tokens_from_parquet, tokens_to_parquet
from orchestrator.artefact import MODEL, changed_parts, require_same
from orchestrator.config import RunConfig, to_yaml
from orchestrator.context import CALIBRATION_TOKENS, RunContext
from orchestrator.evaluate import EVALUATION_TOKENS
from orchestrator.finished import JOB, READY, REPORT, STITCH, finished_report, sha256
from orchestrator.lease import NAME as LEASE
from orchestrator.prepare import Prepared
from orchestrator.report import render_page
from orchestrator.versions import environment
from planners.errors import ConfigError, DataError, StorageError
from planners.plan import to_json
from planners.units import Unit

__all__ = ["READY", "REPORT", "check_run", "finish", "finished_report", "open_run", "recipe_of",
           "write_plan"]  # fmt: skip


def check_run(prepared: Prepared) -> bool:
    """Return whether the directory holds this run already; nothing is written.

    Raises:
        ConfigError: the directory holds another run, or the statistics to reuse are of another
            model or data; the message says what differs.
        StorageError: it holds something that is no run.
    """
    require_same(prepared)
    known = _is_this_run(prepared)
    if not known:
        _refuse_what_is_no_run(prepared.run)
    return known


def open_run(prepared: Prepared) -> None:
    """Write the recipe, plan, environment and tokens, or see that they are those of this run.

    Raises:
        ConfigError: see `check_run`.
        StorageError: see `check_run`, or the directory cannot be written.
    """
    run = prepared.run
    known = check_run(prepared)
    if not known:
        run.delete(READY)  # of a run whose plan was torn
    # First: from here on, whatever else lies here is of this run.
    write_plan(prepared)
    for name, tokens, source in (
        (CALIBRATION_TOKENS, prepared.calibration, prepared.config.calibration.source),
        (EVALUATION_TOKENS, prepared.evaluation, prepared.config.evaluation.source),
    ):
        if not known or not _holds_tokens(run, name, tokens):
            run.write(name, tokens_to_parquet(tokens, {"source": source}))
    run.write("run.yaml", to_yaml(prepared.config, prepared.given).encode())
    run.write("environment.json", _json(environment()))


def write_plan(prepared: Prepared) -> None:
    """Write what a run is, what it does and what that was expected to take."""
    content: dict[str, Any] = {
        "title": prepared.title,
        "identity": to_json(prepared.facts()),
        "model": dict(prepared.origin.contents),
        "plan": to_json(prepared.plan),
    }
    if prepared.expected:
        content["forecast"] = dict(prepared.expected)
    prepared.run.write("plan.json", _json(content))


def recipe_of(run: Directory) -> RunConfig:
    """Return the recipe of an existing run, as it was resolved.

    Raises:
        StorageError: there is no run, or its recipe is broken.
    """
    if run.size("run.yaml") is None:
        raise StorageError(f"{run.uri}: there is no run here", hint="give the --out of a run")
    try:
        config = RunConfig.model_validate(yaml.safe_load(run.read("run.yaml")))
    except (yaml.YAMLError, ValidationError) as error:
        raise StorageError(f"{run.path('run.yaml')}: is not a recipe of ours: {error}") from error
    return config.model_copy(update={"out": run.uri})


def finish(context: RunContext, report: Mapping[str, Any]) -> None:
    """Write the report, mark the run READY, and drop what only the work needed."""
    run = context.run
    data = _json(report)
    run.write(REPORT, data)
    run.write("report.html", render_page(report).encode())
    facts = to_json(context.prepared.facts())
    mark = {
        "identity": facts,
        "created": report["created"],
        "report": sha256(data),
        # A basis is not of the result: its files are dropped, its numbers are in the report.
        "units": sorted({*(u.name for u in context.units if _in_result(context, u)), STITCH}),
    }
    run.write(READY, sealed(mark))
    # Last: a driver that dies before READY finds everything that its successor needs.
    for name in _spent(run, keep_statistics=context.prepared.config.keep_statistics):
        run.delete(name)


def _in_result(context: RunContext, unit: Unit) -> bool:
    return any(file.path.startswith("model/") for file in context.ledger.record(unit).files)


def _spent(run: Directory, *, keep_statistics: bool) -> list[str]:
    """Return the files that served only the work, and what killed workers left half-written."""
    passing = [
        name
        for folder in ("boundary", "draft", "partial", "refit", "shards")
        for name in run.names(folder)
    ]
    sums = [*run.names("stats"), *run.names("basis")]
    written = [*sums, *run.names("model"), *run.names("records")]
    halves = {name for name in written if name.endswith(".tmp")}
    return sorted({*passing, *halves, *(() if keep_statistics else sums)})


def _refuse_what_is_no_run(run: Directory) -> None:
    """Refuse to spread a run among files that are not of one, such as a model's or a home's."""
    if run.size("run.yaml") is not None or run.size("plan.json") is not None:
        return  # of a run whose plan was torn or lost
    strange = [
        name
        for name in run.entries()
        if not name.startswith((".", LEASE, JOB)) and not name.endswith(".tmp")
    ]
    if strange:
        raise StorageError(
            f"{run.uri}: holds {strange[0]!r} and is no run directory",
            hint="use another --out: a new or an empty directory",
        )


def _is_this_run(prepared: Prepared) -> bool:
    """Return whether the directory holds this run, and not none yet."""
    run, facts = prepared.run, to_json(prepared.facts())
    if run.size("plan.json") is None:
        return False
    try:
        plan = json.loads(run.read("plan.json"))
        old = plan["identity"]
        differ = [key for key in facts if old.get(key) != facts[key]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # torn by a crash before anything else was written
    if "schema" in differ:
        raise ConfigError(
            f"{run.uri} holds a run of another version of compress-cluster: its files are of "
            f"schema {old.get('schema', 1)}, those of this version of {facts['schema']}",
            hint="use another --out, or the version that began this run",
        )
    if differ:
        said = [f"{key} was {_short(old.get(key))}, is {_short(facts[key])}" for key in differ]
        there = "the options of the run that is there"
        if MODEL in differ and (changed := changed_parts(plan, prepared)):
            said.insert(0, changed)
            there = "put back the model that the run there began with"
        raise ConfigError(
            f"{run.uri} holds another run: {'; '.join(said)}",
            hint=f"use another --out, or {there}",
        )
    return True


def _holds_tokens(run: Directory, name: str, tokens: np.ndarray) -> bool:
    if run.size(name) is None:
        return False
    try:
        return bool(np.array_equal(tokens_from_parquet(run.read(name)), tokens))
    except DataError:
        return False


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"  # noqa: PLR2004 a hash


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()
