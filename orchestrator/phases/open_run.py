"""Open a run directory; refuse one that holds a different run."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from actors.storage.contents import difference
from actors.storage.files import Directory
from actors.storage.tokens import tokens_from_parquet, tokens_to_parquet
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import RunConfig, to_yaml
from orchestrator.rundir.layout import (
    CALIBRATION_TOKENS,
    EVALUATION_TOKENS,
    JOB,
    READY,
)
from orchestrator.rundir.lease import NAME as LEASE
from orchestrator.rundir.statistics import IDENTITY, MODEL, plan_of, short
from orchestrator.rundir.versions import environment
from planners.canonical_json import json_bytes, to_json
from planners.errors import ConfigError, DataError, StorageError


def check_run(prepared: Prepared) -> bool:
    """Return whether the directory already holds this run; write nothing.

    Raises:
        ConfigError: the directory holds a different run, or the statistics to reuse belong to
            another model or other data; the message says what differs.
        StorageError: the directory holds files that are not a run's.
    """
    require_same(prepared)
    known = _is_this_run(prepared)
    if not known:
        _refuse_unrelated_files(prepared.run)
    return known


def open_run(prepared: Prepared) -> None:
    """Write the recipe, plan, environment and tokens, or check that they belong to this run.

    Raises:
        ConfigError: see `check_run`.
        StorageError: see `check_run`, or the directory cannot be written.
    """
    write_run(prepared, known=check_run(prepared))


def write_run(prepared: Prepared, *, known: bool) -> None:
    """Write the recipe, plan, environment and tokens; ``known`` is the answer of `check_run`.

    Raises:
        StorageError: the directory cannot be written.
    """
    run = prepared.run
    if not known:
        run.delete(READY)  # left by a run whose plan was only partly written
    # First: from here on, every other file in the directory belongs to this run.
    write_plan(prepared)
    for name, tokens, source in (
        (CALIBRATION_TOKENS, prepared.calibration, prepared.config.calibration.source),
        (EVALUATION_TOKENS, prepared.evaluation, prepared.config.evaluation.source),
    ):
        if not known or not holds_tokens(run, name, tokens):
            run.write(name, tokens_to_parquet(tokens, {"source": source}))
    run.write("run.yaml", to_yaml(prepared.config, prepared.given).encode())
    run.write("environment.json", json_bytes(environment()))


def write_plan(prepared: Prepared) -> None:
    """Write the identity of a run, its plan and its forecast."""
    content: dict[str, Any] = {
        "title": prepared.title,
        "identity": to_json(prepared.facts),
        "model": dict(prepared.origin.contents),
        "plan": to_json(prepared.plan),
    }
    if prepared.expected:
        content["forecast"] = dict(prepared.expected)
    prepared.run.write("plan.json", json_bytes(content))


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
        raise StorageError(f"{run.path('run.yaml')}: is not a valid recipe: {error}") from error
    return config.model_copy(update={"out": run.uri})


def _refuse_unrelated_files(run: Directory) -> None:
    """Refuse to mix a run with unrelated files, such as those of a model or a home directory."""
    if run.size("run.yaml") is not None or run.size("plan.json") is not None:
        return  # a run whose plan was only partly written, or was lost
    unrelated = [
        name
        for name in run.entries()
        if not name.startswith((".", LEASE, JOB)) and not name.endswith(".tmp")
    ]
    if unrelated:
        raise StorageError(
            f"{run.uri}: holds {unrelated[0]!r} and is not a run directory",
            hint="use another --out: a new or an empty directory",
        )


def _is_this_run(prepared: Prepared) -> bool:
    """Return whether the directory holds this run; False if it holds none yet."""
    run, facts = prepared.run, to_json(prepared.facts)
    if run.size("plan.json") is None:
        return False
    try:
        plan = json.loads(run.read("plan.json"))
        old = plan["identity"]
        differ = [key for key in facts if old.get(key) != facts[key]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # partly written: a crash came before anything else was written
    if "schema" in differ:
        raise ConfigError(
            f"{run.uri} holds a run of another version of compress-cluster: its files have schema "
            f"{old.get('schema', 1)}, this version needs schema {facts['schema']}",
            hint="use another --out, or the version that started this run",
        )
    if differ:
        changes = [f"{key} was {short(old.get(key))}, is {short(facts[key])}" for key in differ]
        remedy = "repeat the options of the existing run"
        if MODEL in differ and (changed := _changed_parts(plan, prepared)):
            changes.insert(0, changed)
            remedy = "restore the model that the existing run started with"
        raise ConfigError(
            f"{run.uri} holds a different run: {'; '.join(changes)}",
            hint=f"use another --out, or {remedy}",
        )
    return True


def holds_tokens(run: Directory, name: str, tokens: np.ndarray) -> bool:
    """Return whether a file of the run holds these tokens, all of them."""
    if run.size(name) is None:
        return False
    try:
        return bool(np.array_equal(tokens_from_parquet(run.read(name)), tokens))
    except DataError:
        return False


def require_same(prepared: Prepared) -> None:
    """Check that the statistics a run is to reuse are those it would compute itself.

    Raises:
        ConfigError: another model, other data or other settings; the message says what differs.
        StorageError: there is no run.
    """
    first = prepared.origin  # only the first of several steps reads the input model
    if not first.statistics_uri:
        return
    run, facts = Directory(first.statistics_uri), first.facts
    plan = plan_of(run)
    theirs = plan["identity"]
    if "steps" in theirs:
        raise ConfigError(
            f"stats: {run.uri} has several steps; its statistics are of an intermediate model",
            hint=f"use its first step: {run.below('steps/1-' + theirs['steps'][0]['method'])}",
        )
    differ = [key for key in IDENTITY if theirs.get(key) != facts[key]]
    if "schema" in differ:
        raise ConfigError(
            f"stats: {run.uri} is a run of another version of compress-cluster: its files have "
            f"schema {theirs.get('schema', 1)}, this version needs schema {facts['schema']}",
            hint="leave out --stats, or use the version that computed those statistics",
        )
    if differ:
        changes = [f"{k} is {short(facts[k])}, there {short(theirs.get(k))}" for k in differ]
        if MODEL in differ and (changed := _changed_parts(plan, first)):
            changes.insert(0, changed)
        raise ConfigError(
            f"stats: the statistics of {run.uri} cannot be used for this run: {'; '.join(changes)}",
            hint="use the same model, calibration data and settings, or leave out --stats",
        )


def _changed_parts(plan: Mapping[str, Any], prepared: Prepared) -> str:
    """Describe which parts of the model changed since a plan was written."""
    old = plan.get("model")
    return difference(old, prepared.origin.contents) if isinstance(old, dict) else ""
