"""Canonical JSON of data, and its fingerprint."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

SCHEMA_VERSION = 3  # of a run directory: raised when runs of older versions cannot be resumed


def to_json(value: Any) -> Any:
    """Return ``value`` as plain JSON data; dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    return value


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``.

    Raises:
        TypeError: something in ``value`` has no stable JSON form.
    """
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_bytes(value: Any) -> bytes:
    """Return a document of a run directory: JSON for people, keys in order, no NaN."""
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()
