"""The statistics that a run kept: list, describe and verify them."""

import json
from typing import Any

from actors.storage.files import Directory
from actors.storage.records import Record, is_intact, read_records
from actors.storage.sums import check_sums
from actors.storage.tokens import tokens_from_parquet
from orchestrator.rundir.layout import CALIBRATION_TOKENS
from planners.errors import ModelError, StorageError
from planners.units.kinds import KINDS, kind_of, layer_of

# What determines the statistics' values; a method, its options and its target do not.
MODEL = "model revision"
IDENTITY = (
    "schema",
    MODEL,
    "calibration data",
    "microbatch sequences",
    "calibration_dtype",
    "statistics_dtype",
    "threads",
    "device",
)
SHORT = 12  # digits of a hash that are shown


def list_(run: Directory) -> list[dict[str, Any]]:
    """Return one row per layer: its taps, tokens, files and bytes.

    Raises:
        StorageError: there is no run, or it kept no statistics.
    """
    return [
        {
            "layer": layer_of(record.unit),
            "taps": record.values.get("taps", []),
            "num_tokens": record.values.get("num_tokens", 0),
            "files": [file.path for file in record.files],
            "bytes": sum(file.bytes for file in record.files),
        }
        for record in _kept(run)
    ]


def describe(run: Directory) -> dict[str, Any]:
    """Return the model and data of a run's statistics, and their contents.

    Raises:
        StorageError: there is no run, or it kept no statistics.
    """
    rows = list_(run)
    facts = plan_of(run)["identity"]
    sequences, length = tokens_from_parquet(run.read(CALIBRATION_TOKENS)).shape
    return {
        "run": run.uri,
        **{key: facts.get(key) for key in IDENTITY},
        "sequences": sequences,
        "sequence_length": length,
        "num_tokens": rows[0]["num_tokens"],
        "taps": sorted({tap for row in rows for tap in row["taps"]}),
        "layers": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
    }


def verify(run: Directory) -> dict[str, Any]:
    """Compare every file with its record, and check that its sums are plausible.

    Raises:
        StorageError: a file is missing or does not match its record, or its sums are impossible;
            the message names it.
    """
    records = _records(run)
    if not any(run.size(file.path) is not None for record in records for file in record.files):
        _kept(run)  # raises: there are none
    num_files = num_bytes = 0
    for record in records:
        for file in record.files:
            if run.size(file.path) is None:
                raise StorageError(f"{run.path(file.path)}: there is no such file")
            if run.size(file.path) != file.bytes or run.sha256(file.path) != file.sha256:
                raise StorageError(f"{run.path(file.path)}: does not match its record")
            tokens = int(str(record.values.get("num_tokens", 0)))
            try:
                check_sums(run, file.path, num_tokens=tokens)
            except ModelError as error:  # a broken header is a broken file here, not a model
                raise StorageError(str(error)) from error
            num_files, num_bytes = num_files + 1, num_bytes + file.bytes
    return {"run": run.uri, "passed": True, "layers": len(records), "files": num_files,
            "bytes": num_bytes}  # fmt: skip


def _records(run: Directory) -> list[Record]:
    found = sorted(read_records(run).items())
    return [record for name, record in found if kind_of(name) is KINDS["statistics"]]


def _kept(run: Directory) -> list[Record]:
    kept = [record for record in _records(run) if is_intact(run, record, hashes=False)]
    if not kept:
        plan_of(run)
        raise StorageError(
            f"{run.uri}: kept no statistics", hint="--keep-statistics makes a run keep them"
        )
    return kept


def plan_of(run: Directory) -> dict[str, Any]:
    """Return the plan of a run, with its identity.

    Raises:
        StorageError: there is no run, or its plan is broken.
    """
    if run.size("plan.json") is None:
        raise StorageError(f"{run.uri}: there is no run here", hint="pass the --out of a run")
    try:
        found = json.loads(run.read("plan.json"))
        dict(found["identity"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{run.path('plan.json')}: is not the plan of a run") from error
    plan: dict[str, Any] = found
    return plan


def short(value: object) -> str:
    """Return a value as shown in messages: a hash by its first digits."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:SHORT]}…"  # noqa: PLR2004 a hash
