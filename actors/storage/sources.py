"""Find a model: in a local folder, an object store, the package itself, or the Hub."""

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import huggingface_hub as hub  # its modules are imported on first use
from huggingface_hub import constants, errors

from actors.storage.hub import (
    COPIES,
    FILES,
    HTTP_ERROR,
    SCHEME,
    explained,
    find_model,
    first_line,
    no_weights,
)
from planners.errors import CompressionError, ConfigError, ModelError, StorageError
from planners.spelling import did_you_mean

EMBEDDED = "tiny"
HUB_ALIASES: Mapping[str, str] = {
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
}
ALIASES = (EMBEDDED, *HUB_ALIASES)

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONNECT_SECONDS = 5.0
_OBJECT_STORES = ("s3://", "gs://")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """The location of a model.

    Attributes:
        name: short, usable as a folder name: the alias, or the last part of path or id.
        uri: an absolute local directory, the given ``s3://`` or ``gs://`` URI, or
            ``hf://org/name@COMMIT``.
        revision_hint: commit hash of a model from the Hub; else empty: its contents identify it.
    """

    name: str
    uri: str
    revision_hint: str = ""


def resolve_model(name: str, *, copy: bool = True) -> ModelSource:
    """Return the location of a model.

    A name is one of

    - an alias (`ALIASES`), even if a folder has the same name: write ``./tiny`` for the folder;
    - a local directory with a ``config.json``; a name that begins with ``.``, ``/`` or ``~``, or
      exists, is never looked up on the Hub;
    - an ``s3://`` or ``gs://`` URI, which is not opened here;
    - a Hub id ``org/name``, or ``hf://org/name``.

    Alias and Hub id may end in ``@revision``: a branch, tag or commit hash. Without one the newest
    commit is used; either way it is resolved to a commit hash, which is recorded.

    Args:
        name: of the model.
        copy: download a model from the Hub to this machine; without a network, use the copy of an
            earlier download. If False, and always for ``hf://``, nothing is downloaded: every
            process, on any machine, reads the byte ranges that it needs.

    Raises:
        ModelError: there is no such model, access is denied, or the Hub cannot be reached.
        StorageError: the download cannot be written.
    """
    if name.startswith(_OBJECT_STORES):
        return ModelSource(name=name.rstrip("/").rpartition("/")[2], uri=name)
    if "://" in name and not name.startswith(SCHEME):
        raise ModelError(
            f"model {name!r}: its object store is not supported",
            hint=f"give {' or '.join(_OBJECT_STORES)}..., a local directory, or a Hub id org/name",
        )
    if name == EMBEDDED:
        return ModelSource(name=EMBEDDED, uri=str(embedded_model()))
    if place := hub_place(name):
        label, repo_id, revision = place
        if copy and not name.startswith(SCHEME):
            return _download(repo_id, revision=revision, name=label)
        commit = find_model(repo_id, revision)
        return ModelSource(name=label, uri=commit.uri, revision_hint=commit.hash)
    if _is_path(name):
        return _local_model(name)
    label = name.partition("@")[0]
    raise ModelError(
        f"model {name!r}: no such directory or alias{did_you_mean(label, ALIASES)}",
        hint=f"give a directory with a config.json, a Hub id org/name, or one of: "
        f"{', '.join(ALIASES)}",
    )


def resolve_store(given: str) -> str:
    """Return the absolute path of the directory that links of a model may point into, or empty.

    Raises:
        ConfigError: there is no such directory.
    """
    if not given:
        return ""
    path = os.path.expanduser(given)  # noqa: PTH111 unlike Path's, does not raise on ~nobody
    if not os.path.isdir(path):  # noqa: PTH112 nor on a NUL
        raise ConfigError(
            f"model_store: {given!r}: no such directory",
            hint="give the directory that links in the model directory point into, or leave it out",
        )
    return os.path.realpath(path)


def source_here(name: str) -> ModelSource | None:
    """Return the location of a model that is not on the Hub; no request is sent.

    Raises:
        ModelError: there is no such model.
    """
    on_hub = name.startswith(SCHEME) or hub_place(name) is not None
    return None if on_hub else resolve_model(name)


def hub_place(name: str) -> tuple[str, str, str] | None:
    """Return short name, Hub id and revision of a model on the Hub; None for any other name.

    No request is sent. The revision is empty where the name has none.
    """
    label, _, revision = name.removeprefix(SCHEME).rstrip("/").partition("@")
    if label in HUB_ALIASES:
        return label, HUB_ALIASES[label], revision
    if not name.startswith(SCHEME) and _is_path(name):
        return None
    if not _HUB_ID.fullmatch(label):
        return None
    return label.rpartition("/")[2], label, revision


def _is_path(name: str) -> bool:
    try:
        return name.startswith((".", "/", "~")) or (name != "" and Path(name).exists())
    except OSError:  # too long for a file name
        return False


def embedded_model() -> Path:
    """Return the folder of the model that is included in the package."""
    return Path(str(resources.files("actors") / "models" / EMBEDDED))


def _local_model(name: str) -> ModelSource:
    try:
        path = Path(name).expanduser().resolve()
        exists, is_folder = path.exists(), path.is_dir()
        has_config, inner = (path / "config.json").is_file(), path / "model"
        holds_model = (inner / "config.json").is_file()  # name is a run directory with a result
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a loop of links, a NUL.
        raise ModelError(f"model {name!r}: {error}") from error
    if not exists:
        raise ModelError(
            f"model {name!r}: no such directory",
            hint=f"give a directory with a config.json, or one of: {', '.join(ALIASES)}",
        )
    if not is_folder:
        raise ModelError(
            f"model {name!r}: is a file", hint="give the directory with its config.json"
        )
    if not has_config:
        raise ModelError(
            f"model {name!r}: the directory has no config.json",
            hint=f"did you mean {inner}?"
            if holds_model
            else "give the directory that save_pretrained wrote, or the downloaded one",
        )
    return ModelSource(name=path.name or "model", uri=str(path))


def _download(repo_id: str, *, revision: str, name: str) -> ModelSource:
    """Return the local copy of a model on the Hub, downloading only missing files."""
    try:
        blobs = _blobs(repo_id)
        before = _listed(blobs)
        folder = Path(_snapshot(repo_id, revision))
        _check_hashes(folder, new=_listed(blobs) - before, repo_id=repo_id)
    except (HTTP_ERROR, errors.HFValidationError, OSError) as error:
        raise _explained(error, repo_id=repo_id, revision=revision) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise no_weights(repo_id)
    return ModelSource(name=name, uri=str(folder), revision_hint=folder.name)


def _snapshot(repo_id: str, revision: str) -> str:
    """Return the folder of a revision's files, from the local cache if the Hub is unreachable."""

    def download(*, local_files_only: bool) -> str:
        return hub.snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=list(FILES),
            ignore_patterns=list(COPIES),
            etag_timeout=_CONNECT_SECONDS,
            local_files_only=local_files_only,
        )

    try:
        # `snapshot_download` sends the same request, but without a timeout.
        hub.HfApi().model_info(repo_id, revision=revision or None, timeout=_CONNECT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (HTTP_ERROR, ConnectionError) as error:
        try:
            return download(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise error from None  # the reason why the Hub is unreachable is more useful
    return download(local_files_only=False)


def _blobs(repo_id: str) -> Path:
    """Return the cache folder of a repository's files, each named by the hash that the Hub gave."""
    owner, _, model = repo_id.partition("/")
    return Path(constants.HF_HUB_CACHE) / f"models--{owner}--{model}" / "blobs"


def _listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_hashes(folder: Path, *, new: set[str], repo_id: str) -> None:
    """Compare newly downloaded files with the sha256 that the Hub states for large files.

    The download itself compares sizes only. A file that differs is removed.

    Raises:
        ModelError: a file does not match its hash.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        stated = Path(os.path.realpath(path)).name
        if stated in new and _SHA256.fullmatch(stated):
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != stated:
                Path(os.path.realpath(path)).unlink()
                path.unlink()
                raise ModelError(
                    f"model {repo_id}: the download of {path.name} does not match the hash that "
                    f"the Hub states (sha256 {found[:12]}…, not {stated[:12]}…)",
                    hint="it was removed; run the same command again to download it again",
                )


def _explained(error: Exception, *, repo_id: str, revision: str) -> CompressionError:
    """Return a clear error for a failed download."""
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC:
        return StorageError(
            f"model {repo_id}: cannot be written to the download cache: {first_line(error)}",
            hint="set HF_HOME to a writable folder with enough space",
        )
    return explained(error, repo_id=repo_id, revision=revision)
