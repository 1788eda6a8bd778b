"""Where a model comes from: a folder, an object store, the package itself, or the Hub."""

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import huggingface_hub as hub  # its parts are imported when first used
from huggingface_hub import constants, errors

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

# Never a pickle: weights only as safetensors, and what the tokenizer and the config need.
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer.model", "*.txt"]
_HUB_COPIES = ["consolidated*"]  # the same weights once more, under other names
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CONNECT_SECONDS = 5.0
_HTTP_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, passed on
_OBJECT_STORES = ("s3://", "gs://")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: short, fit for the name of a folder: the alias, or the last part of path or id.
        uri: an absolute local directory, or the ``s3://`` or ``gs://`` URI as it was given.
        revision_hint: commit hash of a model from the Hub, else empty: the content decides.
    """

    name: str
    uri: str
    revision_hint: str = ""


def resolve_model(name: str) -> ModelSource:
    """Return where the model of that name is, after downloading it if it is on the Hub.

    A name is one of

    - an alias (`ALIASES`), even where a folder is called the same: write ``./tiny`` for that;
    - a local directory with a ``config.json``; what begins with ``.``, ``/`` or ``~`` or exists is
      never asked of the Hub;
    - an ``s3://`` or ``gs://`` URI, which is not opened here;
    - a Hub id ``org/name``.

    Alias and Hub id may end in ``@revision``: a branch, tag or commit hash. Without one the newest
    commit is used; either way it is resolved to a commit hash, which is recorded. Without a network
    the copy that an earlier download left is used.

    Raises:
        ModelError: there is no such model, it may not be read, or the Hub cannot be reached.
        StorageError: the download cannot be written.
    """
    if name.startswith(_OBJECT_STORES):
        return ModelSource(name=name.rstrip("/").rpartition("/")[2], uri=name)
    if "://" in name:
        raise ModelError(
            f"model {name!r}: is on no known object store",
            hint=f"{' or '.join(_OBJECT_STORES)}..., a local directory, or a Hub id org/name",
        )
    if name == EMBEDDED:
        return ModelSource(name=EMBEDDED, uri=str(embedded_model()))
    label, _, revision = name.partition("@")
    if label in HUB_ALIASES:
        return _download(HUB_ALIASES[label], revision=revision, name=label)
    if _is_path(name):
        return _local_model(name)
    if _HUB_ID.fullmatch(label):
        return _download(label, revision=revision, name=label.rpartition("/")[2])
    raise ModelError(
        f"model {name!r}: no such directory or alias{did_you_mean(label, ALIASES)}",
        hint=f"a directory with a config.json, a Hub id org/name, or one of: {', '.join(ALIASES)}",
    )


def resolve_store(given: str) -> str:
    """Return the directory that links of a model may lead into, absolute; empty if none is given.

    Raises:
        ConfigError: there is no such directory.
    """
    if not given:
        return ""
    path = os.path.expanduser(given)  # noqa: PTH111 unlike Path's, does not raise on ~nobody
    if not os.path.isdir(path):  # noqa: PTH112 nor on a NUL
        raise ConfigError(
            f"model_store: {given!r}: no such directory",
            hint="the directory that links in the model's directory lead into, or nothing",
        )
    return os.path.realpath(path)


def _is_path(name: str) -> bool:
    try:
        return name.startswith((".", "/", "~")) or (name != "" and Path(name).exists())
    except OSError:  # Too long for a file name, so none.
        return False


def embedded_model() -> Path:
    """Return the folder of the model that comes with the package."""
    return Path(str(resources.files("actors") / "models" / EMBEDDED))


def _local_model(name: str) -> ModelSource:
    try:
        path = Path(name).expanduser().resolve()
        exists, is_folder = path.exists(), path.is_dir()
        has_config, inner = (path / "config.json").is_file(), path / "model"
        holds_model = (inner / "config.json").is_file()  # as a run directory does its result
    except (RuntimeError, OSError, ValueError) as error:  # ~nobody, a loop of links, a NUL.
        raise ModelError(f"model {name!r}: {error}") from error
    if not exists:
        raise ModelError(
            f"model {name!r}: no such directory",
            hint=f"a directory with a config.json, or one of: {', '.join(ALIASES)}",
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
            else "give the directory that save_pretrained wrote, or that was downloaded",
        )
    return ModelSource(name=path.name or "model", uri=str(path))


def _download(repo_id: str, *, revision: str, name: str) -> ModelSource:
    """Return the local copy of a model on the Hub; only what is missing travels."""
    try:
        blobs = _blobs(repo_id)
        before = _listed(blobs)
        folder = Path(_snapshot(repo_id, revision))
        _check_hashes(folder, new=_listed(blobs) - before, repo_id=repo_id)
    except (_HTTP_ERROR, errors.HFValidationError, OSError) as error:
        raise _explained(error, repo_id=repo_id, revision=revision) from error
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {repo_id}: the repository has no config.json with .safetensors weights",
            hint="weights in other formats, such as pytorch_model.bin, are not read; convert them",
        )
    return ModelSource(name=name, uri=str(folder), revision_hint=folder.name)


def _snapshot(repo_id: str, revision: str) -> str:
    """Return the folder of a revision's files, from the local cache if the Hub is out of reach."""

    def download(*, local_files_only: bool) -> str:
        return hub.snapshot_download(
            repo_id,
            revision=revision or None,
            allow_patterns=_HUB_FILES,
            ignore_patterns=_HUB_COPIES,
            etag_timeout=_CONNECT_SECONDS,
            local_files_only=local_files_only,
        )

    try:
        # `snapshot_download` asks the same, but waits for an answer for ever.
        hub.HfApi().model_info(repo_id, revision=revision or None, timeout=_CONNECT_SECONDS)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (_HTTP_ERROR, ConnectionError) as error:
        try:
            return download(local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise error from None  # Why the Hub could not be asked says more.
    return download(local_files_only=False)


def _blobs(repo_id: str) -> Path:
    """Return where the cache keeps the files of a repository, each by the hash the Hub gave."""
    owner, _, model = repo_id.partition("/")
    return Path(constants.HF_HUB_CACHE) / f"models--{owner}--{model}" / "blobs"


def _listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _check_hashes(folder: Path, *, new: set[str], repo_id: str) -> None:
    """Compare what was downloaded just now with the sha256 that the Hub states for large files.

    The download itself compares sizes only. A file that differs is removed, to be fetched anew.

    Raises:
        ModelError: a file has other bytes.
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
                    f"model {repo_id}: {path.name} arrived with other bytes than the Hub states "
                    f"(sha256 {found[:12]}…, not {stated[:12]}…)",
                    hint="it was removed; run the same command again to fetch it anew",
                )


def _explained(error: Exception, *, repo_id: str, revision: str) -> CompressionError:
    """Return what a failed download means for the user."""
    page = f"https://huggingface.co/{repo_id}"
    reason = str(error).strip().partition("\n")[0]
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"model {repo_id}: access is restricted to those who were granted it",
            hint=f"ask for access at {page}, then {log_in}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"model {repo_id}: has no revision {revision!r}",
            hint=f"a branch, a tag or a commit hash of {page}/commits",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelError(
            f"model {repo_id}: is neither a local directory nor a repository on the Hub",
            hint=f"check the spelling; if it is private, {log_in}",
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC:
        return StorageError(
            f"model {repo_id}: cannot be written to the cache of downloads: {reason}",
            hint="set HF_HOME to a folder with room",
        )
    return ModelError(
        f"model {repo_id}: cannot be downloaded from the Hub: {reason}",
        hint="check the network and HF_HUB_OFFLINE, or download it elsewhere and give the path of "
        "its directory",
    )
