"""Read the files of a model on the Hub by byte range: ``hf://org/name@COMMIT``.

Every process reads only what it needs, and nothing is stored on a disk. A commit never changes, so
its list of files and small ranges, such as headers, are cached in the process.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any
from urllib.parse import urljoin, urlsplit

import huggingface_hub as hub  # its modules are imported on first use
from huggingface_hub import constants, errors
from pyarrow import fs

from actors.storage.retries import PassingError, ShortReadError, attempt
from planners.errors import CompressionError, ModelError, StorageError

SCHEME = "hf://"
# Never a pickle: safetensors weights, and the files of tokenizer and config.
FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
COPIES = ("consolidated*",)  # a second copy of the same weights, under other names
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # a transfer that moves no byte for so long has failed
LIMIT_SECONDS = 300.0  # the window in which the Hub counts requests
SMALL_BYTES = 2**18  # ranges up to this are cached
SMALL_RANGES = 1024  # cached at most: enough for headers and indices of the largest models
MAX_REDIRECTS = 5
OK, PARTIAL, TOO_MANY, SERVER_ERROR = 200, 206, 429, 500
TIMED_OUT = 408
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
HTTP_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # re-exported from httpx

_lent: list[str] = []
_read: list[str] = []  # the model of the Hub that this process opened last


def lend(token: str) -> None:
    """Use this token for the Hub from now on, in this process only.

    It is kept in memory and not in the environment, which child processes inherit and others can
    read.
    """
    _lent[:] = [token] if token else []


def token_here() -> str:
    """Return the token passed to `lend`, else HF_TOKEN or that of a login; empty if none."""
    return _lent[0] if _lent else hub.get_token() or ""


def token_in_use() -> str:
    """Return the token that workers need; empty where this process reads nothing from the Hub."""
    return token_here() if _read else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a commit.

    Attributes:
        bytes: its size.
        sha256: of its bytes, as stated by the Hub; empty for small files, which have none.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """An immutable state of a repository.

    Attributes:
        repo_id: ``org/name``.
        hash: 40 hex digits.
        files: name -> file, only those that may be read.
    """

    repo_id: str
    hash: str
    files: Mapping[str, HubFile]

    @property
    def uri(self) -> str:
        """The URI that `actors.storage.files.Directory` opens."""
        return f"{SCHEME}{self.repo_id}@{self.hash}"


def find_commit(repo_id: str, revision: str = "") -> Commit:
    """Return the commit of a branch, tag or hash on the Hub; the newest for an empty revision.

    Raises:
        ModelError: there is no such repository or revision, or the Hub cannot be reached.
    """
    try:
        return attempt(lambda: _asked(repo_id, revision), where=f"{SCHEME}{repo_id}", retry=True)
    except StorageError as error:
        raise explained(error, repo_id=repo_id, revision=revision) from error


def find_model(repo_id: str, revision: str = "") -> Commit:
    """Return the commit of a model after checking access by reading one small file of it.

    Raises:
        ModelError: access is denied, or the format is not supported; as `find_commit`.
    """
    commit = find_commit(repo_id, revision)
    if "config.json" not in commit.files or not any(
        name.endswith(".safetensors") for name in commit.files
    ):
        raise no_weights(repo_id)
    # The list of a gated model's files is public; the files are not.
    at = (repo_id, commit.hash, "config.json", 0)
    size = min(commit.files["config.json"].bytes, SMALL_BYTES)
    try:
        attempt(lambda: _small(*at, size), where=f"{commit.uri}/config.json", retry=True)
    except StorageError as error:
        raise explained(error, repo_id=repo_id, revision=revision) from error
    return commit


class HubStore:
    """The files of one commit, with the part of the ``pyarrow.fs`` API that `Directory` needs."""

    def __init__(self, root: str) -> None:
        """Parse ``org/name@COMMIT``; no request is sent.

        Raises:
            ValueError: it has another form.
        """
        self._repo_id, _, self._commit = root.partition("@")
        if self._repo_id.count("/") != 1 or not self._commit:
            raise ValueError("a model on the Hub must have the form hf://org/name@COMMIT")
        self._root = f"{root}/"
        _read[:] = [root]

    def get_file_info(self, path: Any) -> Any:
        """Return the info of a path, or of the files below the folder of a selector."""
        files = _files(self._repo_id, self._commit)
        if isinstance(path, fs.FileSelector):
            below = f"{path.base_dir}/".removeprefix(self._root)
            names = [name for name in files if name.startswith(below)]
            if not path.recursive:
                names = [name for name in names if "/" not in name[len(below) :]]
            return [self._info(name, files[name]) for name in names]
        name = path.removeprefix(self._root)
        if name in files:
            return self._info(name, files[name])
        above = self._root.startswith(f"{path}/")
        return fs.FileInfo(path, fs.FileType.Directory if above else fs.FileType.NotFound)

    def stated_sha256(self, path: str) -> str:
        """Return the sha256 of a file that the Hub states; empty if none."""
        file = _files(self._repo_id, self._commit).get(path.removeprefix(self._root))
        return file.sha256 if file else ""

    def open_input_file(self, path: str) -> "_RemoteFile":
        """Open a file for reading byte ranges.

        Raises:
            FileNotFoundError: the commit has no such file.
        """
        name = path.removeprefix(self._root)
        file = _files(self._repo_id, self._commit).get(name)
        if file is None:
            raise FileNotFoundError(name)
        return _RemoteFile(self._repo_id, self._commit, name, file.bytes)

    def _info(self, name: str, file: HubFile) -> Any:
        return fs.FileInfo(f"{self._root}{name}", fs.FileType.File, size=file.bytes)

    def open_output_stream(self, path: str, **options: Any) -> Any:
        """Refuse to write.

        Raises:
            OSError: always.
        """
        del path, options
        raise OSError("files on the Hub are read-only")


class _RemoteFile:
    """A file on the Hub, with a read position."""

    def __init__(self, repo_id: str, commit: str, name: str, size: int) -> None:
        self._at = (repo_id, commit, name)
        self._size, self._position = size, 0

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Do nothing: no connection is held open."""

    def size(self) -> int:
        return self._size

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes.

        Raises:
            OSError: a transient failure; a retry may succeed.
            ModelError: a permanent failure.
        """
        view = memoryview(buffer).cast("B")
        if len(view) <= SMALL_BYTES:
            view[:] = _small(*self._at, self._position, len(view))
        else:
            _fill(*self._at, self._position, view)
        self._position += len(view)
        return len(view)


@functools.lru_cache(maxsize=8)
def _files(repo_id: str, commit: str) -> Mapping[str, HubFile]:
    return _asked(repo_id, commit).files


def _asked(repo_id: str, revision: str) -> Commit:
    """Request a commit from the Hub once, without a retry.

    Raises:
        PassingError: a transient failure; a retry may succeed.
        ModelError: a permanent failure.
    """
    try:
        found = hub.HfApi(token=token_here() or False).model_info(
            repo_id, revision=revision or None, files_metadata=True, timeout=CONNECT_SECONDS
        )
    except (HTTP_ERROR, errors.HFValidationError, OSError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        passing = _may_pass(code) if code else isinstance(error, HTTP_ERROR)
        if passing:
            raise PassingError(first_line(error)) from error
        raise explained(error, repo_id=repo_id, revision=revision) from error
    files = {
        each.rfilename: HubFile(bytes=each.size or 0, sha256=each.lfs.sha256 if each.lfs else "")
        for each in found.siblings or ()
        if _is_read(each.rfilename)
    }
    return Commit(repo_id=repo_id, hash=str(found.sha), files=files)


@functools.lru_cache(maxsize=SMALL_RANGES)
def _small(repo_id: str, commit: str, name: str, start: int, size: int) -> bytes:
    data = bytearray(size)
    if size:
        _fill(repo_id, commit, name, start, memoryview(data))
    return bytes(data)


def _fill(repo_id: str, commit: str, name: str, start: int, view: memoryview) -> None:
    """Read one range into memory, checking that offset and length are the requested ones."""
    url = hub.hf_hub_url(repo_id, name, revision=commit)
    wanted = f"bytes {start}-{start + len(view) - 1}/"
    with _answer(url, wanted, repo_id=repo_id, commit=commit) as answer:
        received = answer.headers.get("Content-Range", "")
        if answer.status_code != PARTIAL or not received.startswith(wanted):
            raise PassingError(f"received {received or 'a whole file'} instead of {wanted}")
        done = 0
        for piece in answer.iter_raw():
            if done + len(piece) > len(view):
                raise PassingError("received more bytes than requested")
            view[done : done + len(piece)] = piece
            done += len(piece)
    if done != len(view):
        raise ShortReadError(f"received {done} of the {len(view)} requested bytes")


@contextmanager
def _answer(url: str, wanted: str, *, repo_id: str, commit: str) -> Iterator[Any]:
    """Yield the response with a range of a file, following the redirects of the Hub."""
    token = token_here()
    headers = {"Range": wanted.replace(" ", "=").rstrip("/"), "Accept-Encoding": "identity"}
    private = {"Authorization": f"Bearer {token}"} if token else {}
    waited = False
    for _ in range(MAX_REDIRECTS):
        try:
            with _request(url, {**headers, **private}) as answer:
                if target := answer.headers.get("Location"):
                    there = urljoin(url, target)
                    if _origin(there) != _origin(url):
                        private = {}  # the token is for the Hub only, not for the store behind it
                    url = there
                    continue
                if answer.status_code == TOO_MANY and not waited:
                    waited = True
                    time.sleep(_retry_seconds(answer.headers))
                    continue
                _require(answer, repo_id=repo_id, commit=commit)
                yield answer
                return
        except HTTP_ERROR as error:
            host = urlsplit(url).hostname
            raise PassingError(f"{host}: {first_line(error)}") from error
    raise PassingError("the Hub redirects too often")


def _request(url: str, headers: Mapping[str, str]) -> Any:
    """Return a context manager with the response to one request, its body unread."""
    client = hub.get_session()
    limits = (CONNECT_SECONDS, SILENT_SECONDS, SILENT_SECONDS, SILENT_SECONDS)
    return client.stream("GET", url, headers=headers, timeout=limits, follow_redirects=False)


def _require(answer: Any, *, repo_id: str, commit: str) -> None:
    """Raise unless a response is a success.

    Raises:
        PassingError: a transient failure; a retry may succeed.
        ModelError: a permanent failure.
    """
    code = answer.status_code
    if code in (OK, PARTIAL):
        return
    # The URL of a store of the Hub contains a signature, so messages have its host only.
    host = urlsplit(str(answer.request.url)).hostname
    if _may_pass(code):
        raise PassingError(f"{host} responded with HTTP {code}")
    if _origin(str(answer.request.url)) != _origin(constants.ENDPOINT):
        raise PassingError(f"{host} responded with HTTP {code}")  # its signature expires in minutes
    try:
        answer.read()
        hub.hf_raise_for_status(answer)
    except HTTP_ERROR as error:
        raise explained(error, repo_id=repo_id, revision=commit) from error


def _may_pass(code: int) -> bool:
    return code >= SERVER_ERROR or code in (TIMED_OUT, TOO_MANY)


def _retry_seconds(headers: Mapping[str, str]) -> float:
    """Return the seconds after which the Hub accepts requests again, from its headers."""
    for field in (*headers.get("RateLimit", "").split(";"), headers.get("Retry-After", "")):
        text = field.strip().removeprefix("t=")
        if text.isdigit():
            return min(float(text) + 1, LIMIT_SECONDS)
    return 1.0


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _is_read(name: str) -> bool:
    # Like the patterns of `snapshot_download`, where a star also matches slashes.
    wanted = any(fnmatch(name, pattern) for pattern in FILES)
    return wanted and not any(fnmatch(name, pattern) for pattern in COPIES)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def no_weights(repo_id: str) -> ModelError:
    """Return the error for a repository without a model in a supported format."""
    return ModelError(
        f"model {repo_id}: the repository has no config.json with .safetensors weights",
        hint="other formats, such as pytorch_model.bin, are not supported; convert the weights",
    )


def explained(error: Exception, *, repo_id: str, revision: str) -> CompressionError:
    """Return a clear error for a failed request to the Hub."""
    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"model {repo_id}: access is restricted to users who were granted it",
            hint=f"request access at {page}, then {LOG_IN}; `submit` passes the token on",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"model {repo_id}: has no revision {revision!r}",
            hint=f"give a branch, a tag or a commit hash from {page}/commits",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelError(
            f"model {repo_id}: is neither a local directory nor a repository on the Hub",
            hint=f"check the spelling; if it is private, {LOG_IN}",
        )
    return ModelError(
        f"model {repo_id}: cannot be downloaded from the Hub: {first_line(error)}",
        hint="check the network and HF_HUB_OFFLINE, or download it elsewhere and give the path of "
        "its directory",
    )
