"""The contents of a model as hashes: they identify a run, and workers check what they read.

The contents of a model are ``config.json`` -> sha256 of its parsed values, and tensor -> sha256 of
its dtype, shape and bytes. How the tensors are spread over files makes no difference. For a model
at a commit of the Hub they are file -> sha256 of its bytes, as the Hub states it.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.records import sealed, unsealed

CONFIG = "config.json"
# Files that a result copies unchanged from the model, if it has them.
TAKEN_OVER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
# A file that changed more recently may change again and keep the same time: some file systems have
# a resolution of two seconds, and pages that are written through a mapping for 35 s have the time
# of the first write.
SETTLED_SECONDS = 60.0


def revision_of(contents: Mapping[str, str]) -> str:
    """Return the identity of a model: sha256 of its contents, in the order of their names."""
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the sha256 of a config's values, whatever the order of keys and the white space."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def tokenizer_hash(directory: Directory) -> str:
    """Return the sha256 of names and bytes of the files that a result copies from a model."""
    files = {
        name: directory.sha256(name) for name in TAKEN_OVER if directory.size(name) is not None
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def hasher(entry: TensorEntry) -> "hashlib._Hash":
    """Return a sha256 of a tensor's dtype and shape, to be updated with its bytes."""
    return hashlib.sha256(json.dumps([entry.dtype, entry.shape]).encode())


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return a text with the first changed part of a model and how many more; empty if none."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if not names:
        return ""
    is_file = names[0].endswith((".json", ".safetensors"))
    first = names[0] if is_file else f"tensor {names[0]}"
    return f"{first} of the model changed" + (f", and {len(names) - 1} more" if names[1:] else "")


def remembered(
    directory: Directory, file: str, names: Iterable[str], hashed: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """Return the hashes of a file's tensors, from the cache where the file is unchanged.

    They are stored in the user's cache with the file's `Directory.key`. Nothing is stored for a
    local file that changed within the last minute, or that changes while it is read.

    Args:
        directory: of the model.
        file: with the tensors.
        names: of the tensors.
        hashed: reads and hashes them.
    """
    began, key = time.time(), directory.key(file)
    if key is None:
        return hashed()
    place = _place(directory, file)
    known = _kept(place, key)
    if known is not None and known.keys() == set(names):
        return known
    found = hashed()
    changed = key.get("ctime_ns")  # an object in a store has none; its tag depends on its content
    settled = changed is None or changed / 1e9 < began - SETTLED_SECONDS
    if place is not None and settled and directory.key(file) == key:
        _keep(place, sealed({"key": key, "tensors": found}))
    return found


def cache_folder() -> Path:
    """Return the cache folder; everything in it can be recomputed.

    Raises:
        RuntimeError: the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "compress-cluster"


def _place(directory: Directory, file: str) -> Path | None:
    with contextlib.suppress(RuntimeError):  # no home: everything is read each time
        name = hashlib.sha256(directory.path(file).encode()).hexdigest()[:32]
        return cache_folder() / "contents" / f"{name}.json"
    return None


def _kept(place: Path | None, key: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the cached hashes for a key; None where the file is missing or damaged."""
    try:
        data = b"" if place is None else place.read_bytes()
    except OSError:  # never written, or not readable: the model is read
        return None
    found = unsealed(data)
    return None if found is None or found.get("key") != key else found["tensors"]


def _keep(place: Path, data: bytes) -> None:
    new = place.with_suffix(f".{uuid4().hex[:12]}.tmp")
    with contextlib.suppress(OSError):  # without a writable cache the model is read again next time
        place.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(data)
        new.replace(place)
