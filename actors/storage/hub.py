"""A model on the Hub as a directory whose files are read by byte range: ``hf://org/name@COMMIT``.

Every process reads what it needs and no more, and nothing is kept on a disk. A commit never
changes, so its list of files and small ranges, such as headers, are asked for once in a process.
"""

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any
from urllib.parse import urljoin, urlsplit

import huggingface_hub as hub  # its parts are imported when first used
from huggingface_hub import constants, errors
from pyarrow import fs

from actors.storage.retries import PassingError, ShortReadError, attempt
from planners.errors import CompressionError, ModelError, StorageError

SCHEME = "hf://"
# Never a pickle: weights only as safetensors, and what the tokenizer and the config need.
FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.txt", "*.jinja")
COPIES = ("consolidated*",)  # the same weights once more, under other names
CONNECT_SECONDS = 5.0
SILENT_SECONDS = 20.0  # a transfer that moves no byte for so long has failed
LIMIT_SECONDS = 300.0  # the window in which the Hub counts requests
SMALL_BYTES = 2**18  # a range up to this is kept
SMALL_RANGES = 1024  # that many: the headers and indices of the largest models in use
MAX_REDIRECTS = 5
OK, PARTIAL, TOO_MANY, SERVER_ERROR = 200, 206, 429, 500
TIMED_OUT = 408
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
HTTP_ERROR: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # httpx's, passed on

_lent: list[str] = []
_read: list[str] = []  # what this process has named of the Hub


def lend(token: str) -> None:
    """Read from the Hub with this token from now on, in this process alone.

    It is kept in memory: not in the environment, which other processes inherit and others read.
    """
    _lent[:] = [token] if token else []


def token_here() -> str:
    """Return the token that was lent, or that of this machine: HF_TOKEN or a login; or nothing."""
    return _lent[0] if _lent else hub.get_token() or ""


def token_in_use() -> str:
    """Return the token that workers for this process need; none where it reads nothing there."""
    return token_here() if _read else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFile:
    """A file of a commit.

    Attributes:
        bytes: of it.
        sha256: of its bytes as the Hub states it; empty of small files, for which it does not.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A state of a repository that never changes.

    Attributes:
        repo_id: ``org/name``.
        hash: 40 hex digits.
        files: name -> file, of those that are read.
    """

    repo_id: str
    hash: str
    files: Mapping[str, HubFile]

    @property
    def uri(self) -> str:
        """As `actors.storage.files.Directory` opens it."""
        return f"{SCHEME}{self.repo_id}@{self.hash}"


def find_commit(repo_id: str, revision: str = "") -> Commit:
    """Ask the Hub for the commit that a branch, tag or hash names; the newest where it is empty.

    Raises:
        ModelError: there is no such repository or revision, or the Hub cannot be reached.
    """
    try:
        return attempt(lambda: _asked(repo_id, revision), where=f"{SCHEME}{repo_id}", retry=True)
    except StorageError as error:
        raise explained(error, repo_id=repo_id, revision=revision) from error


def find_model(repo_id: str, revision: str = "") -> Commit:
    """Return the commit of a model that this process may read: one small file of it is read.

    Raises:
        ModelError: it may not be read, or is none in the format that is read; as `find_commit`.
    """
    commit = find_commit(repo_id, revision)
    if "config.json" not in commit.files or not any(
        name.endswith(".safetensors") for name in commit.files
    ):
        raise no_weights(repo_id)
    # The list of a gated model's files is everybody's; its files are not.
    at = (repo_id, commit.hash, "config.json", 0)
    size = min(commit.files["config.json"].bytes, SMALL_BYTES)
    try:
        attempt(lambda: _small(*at, size), where=f"{commit.uri}/config.json", retry=True)
    except StorageError as error:
        raise explained(error, repo_id=repo_id, revision=revision) from error
    return commit


class HubStore:
    """The files of one commit, in the words of ``pyarrow.fs`` that `Directory` uses; read only."""

    def __init__(self, root: str) -> None:
        """Name a commit as ``org/name@COMMIT``; nothing is asked yet.

        Raises:
            ValueError: it is none.
        """
        self._repo_id, _, self._commit = root.partition("@")
        if self._repo_id.count("/") != 1 or not self._commit:
            raise ValueError("a model on the Hub is named hf://org/name@COMMIT")
        self._root = f"{root}/"
        _read[:] = [root]

    def get_file_info(self, asked: Any) -> Any:
        """Return what there is at a path, or the files below the folder of a selector."""
        files = _files(self._repo_id, self._commit)
        if isinstance(asked, fs.FileSelector):
            below = f"{asked.base_dir}/".removeprefix(self._root)
            names = [name for name in files if name.startswith(below)]
            if not asked.recursive:
                names = [name for name in names if "/" not in name[len(below) :]]
            return [self._info(name, files[name]) for name in names]
        name = asked.removeprefix(self._root)
        if name in files:
            return self._info(name, files[name])
        above = self._root.startswith(f"{asked}/")
        return fs.FileInfo(asked, fs.FileType.Directory if above else fs.FileType.NotFound)

    def stated_sha256(self, path: str) -> str:
        """Return the hash of a file's bytes as the Hub states it; empty where it does not."""
        file = _files(self._repo_id, self._commit).get(path.removeprefix(self._root))
        return file.sha256 if file else ""

    def open_input_file(self, path: str) -> "_RemoteFile":
        """Return a file to read ranges of.

        Raises:
            FileNotFoundError: the commit has none of that name.
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
        raise OSError("files on the Hub are only read")


class _RemoteFile:
    """A position in a file on the Hub."""

    def __init__(self, repo_id: str, commit: str, name: str, size: int) -> None:
        self._at = (repo_id, commit, name)
        self._size, self._position = size, 0

    def __enter__(self) -> "_RemoteFile":
        return self

    def __exit__(self, *error: object) -> None:
        """Hold nothing open."""

    def size(self) -> int:
        return self._size

    def seek(self, position: int) -> None:
        self._position = position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes.

        Raises:
            OSError: it may help to try again.
            ModelError: it would not.
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
    """Ask the Hub once.

    Raises:
        PassingError: another try may do better.
        ModelError: none would.
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
    """Read one range into memory; its length and place are those that were asked for."""
    url = hub.hf_hub_url(repo_id, name, revision=commit)
    wanted = f"bytes {start}-{start + len(view) - 1}/"
    with _answer(url, wanted, repo_id=repo_id, commit=commit) as answer:
        said = answer.headers.get("Content-Range", "")
        if answer.status_code != PARTIAL or not said.startswith(wanted):
            raise PassingError(f"{said or 'a whole file'} came where {wanted} was asked for")
        done = 0
        for piece in answer.iter_raw():
            if done + len(piece) > len(view):
                raise PassingError("more bytes came than were asked for")
            view[done : done + len(piece)] = piece
            done += len(piece)
    if done != len(view):
        raise ShortReadError(f"{done} bytes came of the {len(view)} that were asked for")


@contextmanager
def _answer(url: str, wanted: str, *, repo_id: str, commit: str) -> Iterator[Any]:
    """Give the answer with a range of a file, where the Hub sends us for it."""
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
                        private = {}  # the token is for the Hub, not for where it keeps its files
                    url = there
                    continue
                if answer.status_code == TOO_MANY and not waited:
                    waited = True
                    time.sleep(_told_to_wait(answer.headers))
                    continue
                _require(answer, repo_id=repo_id, commit=commit)
                yield answer
                return
        except HTTP_ERROR as error:
            host = urlsplit(url).hostname
            raise PassingError(f"{host}: {first_line(error)}") from error
    raise PassingError("the Hub sends us from one place to the next")


def _request(url: str, headers: Mapping[str, str]) -> Any:
    """Return a context that gives the answer to one request, whose body was not read yet."""
    client = hub.get_session()
    limits = (CONNECT_SECONDS, SILENT_SECONDS, SILENT_SECONDS, SILENT_SECONDS)
    return client.stream("GET", url, headers=headers, timeout=limits, follow_redirects=False)


def _require(answer: Any, *, repo_id: str, commit: str) -> None:
    """See that an answer is one.

    Raises:
        PassingError: another try may do better.
        ModelError: none would.
    """
    code = answer.status_code
    if code in (OK, PARTIAL):
        return
    # The address of a store of the Hub holds a signature, so only its host is told.
    host = urlsplit(str(answer.request.url)).hostname
    if _may_pass(code):
        raise PassingError(f"{host} answers {code}")
    if _origin(str(answer.request.url)) != _origin(constants.ENDPOINT):
        raise PassingError(f"{host} answers {code}")  # its address was signed for minutes only
    try:
        answer.read()
        hub.hf_raise_for_status(answer)
    except HTTP_ERROR as error:
        raise explained(error, repo_id=repo_id, revision=commit) from error


def _may_pass(code: int) -> bool:
    return code >= SERVER_ERROR or code in (TIMED_OUT, TOO_MANY)


def _told_to_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds after which the Hub takes requests again, as it says itself."""
    for field in (*headers.get("RateLimit", "").split(";"), headers.get("Retry-After", "")):
        text = field.strip().removeprefix("t=")
        if text.isdigit():
            return min(float(text) + 1, LIMIT_SECONDS)
    return 1.0


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()


def _is_read(name: str) -> bool:
    # As `snapshot_download` takes its patterns: a star goes over folders too.
    wanted = any(fnmatch(name, pattern) for pattern in FILES)
    return wanted and not any(fnmatch(name, pattern) for pattern in COPIES)


def first_line(error: Exception) -> str:
    """Return what an error says, without what follows."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def no_weights(repo_id: str) -> ModelError:
    """Return the refusal of a repository that holds no model in the format that is read."""
    return ModelError(
        f"model {repo_id}: the repository has no config.json with .safetensors weights",
        hint="weights in other formats, such as pytorch_model.bin, are not read; convert them",
    )


def explained(error: Exception, *, repo_id: str, revision: str) -> CompressionError:
    """Return what a failed question to the Hub means for the user."""
    page = f"https://huggingface.co/{repo_id}"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"model {repo_id}: access is restricted to those who were granted it",
            hint=f"ask for access at {page}, then {LOG_IN}; `submit` takes that along",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"model {repo_id}: has no revision {revision!r}",
            hint=f"a branch, a tag or a commit hash of {page}/commits",
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
