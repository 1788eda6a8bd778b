"""One place where bytes go in and out: a directory, local or on an object store.

Local files are written under a temporary name, flushed to the disk and renamed, so that a name
either holds all its bytes or does not exist. On an object store the object becomes visible when its
upload is completed, which says the same; nothing is ever renamed there. A read gives all bytes that
were asked for, or an error.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar
from uuid import uuid4

from pyarrow import fs

from actors.storage.quoting import require_utf8, shown
from actors.storage.retries import ShortReadError, attempt, explained
from actors.storage.stores import open_store
from planners.errors import StorageError

HASHED_ASIDE = 2**20  # bytes of a piece from which a thread of its own is worth it
BUFFER_BYTES = 2**23  # an object up to this is one request; a larger one goes in parts of this size
PIECE_BYTES = 2**22  # read at one time where the whole is not wanted
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file as it was written: path below the root, sha256 in hex, and bytes."""

    path: str
    sha256: str
    bytes: int


class HashingStream:
    """Passes bytes on and keeps their sha256 and number.

    Large pieces are hashed in a thread while they are written. A piece is not to be changed before
    the next one is written or the entry is asked for.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._hashing: Thread | None = None
        self.bytes = 0

    def write(self, data: Any) -> None:
        """Write bytes, or anything that shows its memory as bytes."""
        self._wait()
        if len(data) >= HASHED_ASIDE:
            self._hashing = Thread(target=self._sha256.update, args=(data,))
            self._hashing.start()
        else:
            self._sha256.update(data)
        self._stream.write(data)
        self.bytes += len(data)

    def entry(self, path: str) -> FileEntry:
        """Return what was written so far as a file of that name."""
        self._wait()
        return FileEntry(path=path, sha256=self._sha256.hexdigest(), bytes=self.bytes)

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.join()
            self._hashing = None


class Directory:
    """A directory named by a local path or a URI that ``pyarrow.fs`` understands.

    It can be sent to another process: only the URI travels.
    """

    def __init__(self, uri: str) -> None:
        """Name a directory; nothing is read or created.

        Raises:
            StorageError: the URI is not one that can be opened, is not UTF-8, or holds a password.
        """
        _refuse_password(uri)
        require_utf8(uri, StorageError)
        try:
            if "://" in uri:
                self._fs, self._sink, root = open_store(uri)
                self.uri = uri
            else:
                self._fs = self._sink = fs.LocalFileSystem()
                root = str(Path(uri).expanduser().resolve())
                self.uri = root  # a process elsewhere has another working directory
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~nobody, or a loop.
            raise explained(error, shown(uri)[1:-1]) from error
        require_utf8(root, StorageError)  # the directory that it is below may have another name
        self.root = root.rstrip("/")
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)
        if not self.is_local and not self.root:
            raise StorageError(f"{uri}: names no bucket", hint="such as s3://bucket/folder")

    def __reduce__(self) -> tuple[type["Directory"], tuple[str]]:
        """Return what another process needs to name the same directory."""
        return (Directory, (self.uri,))

    def path(self, name: str) -> str:
        """Return the full path of a name below the root, as people write it."""
        return f"{self.root}/{name}" if self.is_local else f"{self.uri.split('?')[0]}/{name}"

    def below(self, folder: str) -> str:
        """Return the URI of a folder inside this directory; a URI's query stays at its end."""
        if "://" not in self.uri:
            return f"{self.root}/{folder}"
        base, mark, query = self.uri.partition("?")
        return f"{base.rstrip('/')}/{folder}{mark}{query}"

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingStream]:
        """Give a stream for a whole file; the file exists once the block ends without an error.

        Raises:
            StorageError: the file cannot be written, the message says why and where.
        """
        if self.is_local:
            with self._storage_errors(name), self._local_file(name) as stream:
                yield stream
            return
        upload = _Upload(lambda: self._sink.open_output_stream(self._full(name), compression=None))

        def put() -> None:
            with self._fs.open_output_stream(self._full(name), compression=None) as target:
                target.write(upload.held)

        try:
            with self._storage_errors(name):
                stream = HashingStream(upload)
                yield stream
            if not upload.is_streaming:
                self._do(name, put)
            else:
                with self._storage_errors(name):
                    upload.close()
        except BaseException:  # raised again: whatever ended the block, no half of a file stays
            if upload.is_streaming:
                self._withdraw(name, upload)
            raise

    def write(self, name: str, data: bytes) -> FileEntry:
        """Write a whole file.

        Raises:
            StorageError: it cannot be written.
        """
        with self.writing(name) as stream:
            stream.write(data)
        return stream.entry(name)

    def read(self, name: str) -> bytes:
        """Return a whole file.

        Raises:
            StorageError: it cannot be read.
        """

        def whole() -> bytes:
            with self._fs.open_input_file(self._full(name)) as file:
                return bytes(_filled(file, file.size()))

        return self._do(name, whole)

    def read_range(self, name: str, start: int, size: int) -> bytearray:
        """Return ``size`` bytes from ``start`` on, in memory of their own.

        Raises:
            StorageError: it cannot be read, or is shorter than that.
        """

        def part() -> bytearray:
            with self._fs.open_input_file(self._full(name)) as file:
                file.seek(start)
                return _filled(file, min(size, max(file.size() - start, 0)))

        data = self._do(name, part)
        if len(data) != size:
            raise StorageError(
                f"{self.path(name)}: {len(data)} bytes at {start} where {size} were expected"
            )
        return data

    def pieces(self, name: str) -> Iterator[bytearray]:
        """Give a whole file a piece at a time, for what need not be in memory at once.

        Raises:
            StorageError: it cannot be read.
        """
        file = self._do(name, lambda: self._fs.open_input_file(self._full(name)))
        with file:
            total = file.size()
            for start in range(0, total, PIECE_BYTES):
                size = min(PIECE_BYTES, total - start)

                def piece(start: int = start, size: int = size) -> bytearray:
                    file.seek(start)
                    return _filled(file, size)

                yield self._do(name, piece)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is none."""
        info = self._do(name, lambda: self._fs.get_file_info(self._full(name)))
        return int(info.size) if info.type == fs.FileType.File else None

    def key(self, name: str) -> dict[str, Any] | None:
        """Return what another content of a file would change, without reading it.

        Of a local file its inode, size and times, the time of the last change of the inode among
        them, which no program can set; of an object what its store says, the tag of its content
        among it. None where the store gives no tag.

        Raises:
            StorageError: there is no such file.
        """
        if self.is_local:
            with self._storage_errors(name):
                found = Path(self._full(name)).stat()  # of what a link leads to
            return {
                "device": found.st_dev,
                "inode": found.st_ino,
                "bytes": found.st_size,
                "mtime_ns": found.st_mtime_ns,
                "ctime_ns": found.st_ctime_ns,
            }

        def said() -> dict[bytes, bytes]:
            with self._fs.open_input_file(self._full(name)) as file:
                return dict(file.metadata() or {})

        facts = {_text(k): _text(v) for k, v in self._do(name, said).items()}
        return facts if any(k.lower() == "etag" and v for k, v in facts.items()) else None

    def has_bucket(self) -> bool:
        """Return whether what the URI begins with exists: a missing file may be a missing store."""
        bucket = self.root.partition("/")[0]
        if self.is_local:
            return True
        found = self._do("", lambda: self._fs.get_file_info(bucket).type)
        return bool(found != fs.FileType.NotFound)

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files below a folder, sorted; none where it does not exist."""
        selector = fs.FileSelector(
            self._full(folder).rstrip("/"), recursive=True, allow_not_found=True
        )
        start = len(self.root) + 1

        def found() -> list[str]:
            infos = self._fs.get_file_info(selector)
            return sorted(i.path[start:] for i in infos if i.type == fs.FileType.File)

        return self._do(folder, found)

    def entries(self) -> list[str]:
        """Return the names of the files and folders that lie directly in the root, sorted."""
        selector = fs.FileSelector(self.root, recursive=False, allow_not_found=True)
        return self._do("", lambda: sorted(i.base_name for i in self._fs.get_file_info(selector)))

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

        def remove() -> None:
            # Another driver, or the try before this one, may have been faster.
            with contextlib.suppress(FileNotFoundError):
                self._fs.delete_file(self._full(name))

        if self.size(name) is not None:
            self._do(name, remove)

    def sha256(self, name: str) -> str:
        """Return the hash of a file's bytes, read in pieces."""
        digest = hashlib.sha256()
        for piece in self.pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def stated_sha256(self, name: str) -> str:
        """Return the hash of a file's bytes where its store states it, as the Hub does; or nothing.

        Nothing of the file is read.
        """
        stated = getattr(self._fs, "stated_sha256", None)
        return "" if stated is None else str(self._do(name, lambda: stated(self._full(name))))

    def _do(self, name: str, action: Callable[[], _T]) -> _T:
        try:
            return attempt(action, where=self.path(name), retry=not self.is_local)
        except UnicodeDecodeError as error:
            found = bytes(error.object).decode(errors="backslashreplace")
            raise StorageError(
                f"{self.path(name)}: holds a file whose name is not UTF-8: {found}",
                hint="rename it with mv, or remove it",
            ) from error

    @contextlib.contextmanager
    def _storage_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explained(error, self.path(name)) from error

    @contextlib.contextmanager
    def _local_file(self, name: str) -> Iterator[HashingStream]:
        full = self._full(name)
        temporary = f"{full}.{uuid4().hex[:12]}.tmp"
        self._fs.create_dir(full.rpartition("/")[0], recursive=True)
        stream = self._fs.open_output_stream(temporary, compression=None)
        try:
            yield HashingStream(stream)
            stream.close()
            _flush_and_rename(temporary, full)
        except BaseException:  # raised again, as above
            with contextlib.suppress(OSError):  # of what could not be flushed
                stream.close()
            Path(temporary).unlink(missing_ok=True)
            raise

    def _withdraw(self, name: str, upload: "_Upload") -> None:
        """Leave no object of an upload that failed in the middle.

        Arrow has no way to give an upload up: it completes what it has when the stream is closed,
        at the latest when the stream is collected. So it is closed here, and the object removed.
        """
        with contextlib.suppress(OSError):
            upload.abandon()
        with contextlib.suppress(StorageError):
            self.delete(name)

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


class _Upload:
    """Bytes on their way to an object: held back while they are few, then sent in parts.

    What is held back can be sent again; nothing of it is visible before it is whole.
    """

    def __init__(self, open_stream: Callable[[], Any]) -> None:
        self._open = open_stream
        self._held = bytearray()
        self._stream: Any = None

    @property
    def is_streaming(self) -> bool:
        """Part of it is on its way."""
        return self._stream is not None

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BUFFER_BYTES):
            self._held += view[start : start + BUFFER_BYTES]
            if len(self._held) > BUFFER_BYTES:
                self._send()

    @property
    def held(self) -> bytes:
        """What was not sent yet; all of it, where nothing is on its way."""
        return bytes(self._held)

    def close(self) -> None:
        """Send what is left, and make the object visible."""
        if self._held:
            self._send()
        self._stream.close()

    def abandon(self) -> None:
        """Send nothing more; what was sent may become visible."""
        if not self._stream.closed:
            self._stream.close()

    def _send(self) -> None:
        if self._stream is None:
            self._stream = self._open()
        held, self._held = bytes(self._held), bytearray()
        self._stream.write(held)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _filled(file: Any, size: int) -> bytearray:
    """Return the next ``size`` bytes of a file.

    Where a store's answer is too short and says so itself, Arrow counts it as whole and leaves the
    rest of the memory as it was. So the last byte is set before, and must have changed; where what
    came happens to be the same byte, it comes once more onto the opposite one.

    Raises:
        ShortReadError: fewer came.
    """
    data = bytearray(size)
    if not size:
        return data
    begin = file.tell()
    for mark in (0x55, 0xAA):
        data[-1] = mark
        file.seek(begin)
        if file.readinto(data) != size:
            break
        if data[-1] != mark:
            return data
    raise ShortReadError(f"fewer bytes came than the {size} that were asked for")


def _refuse_password(uri: str) -> None:
    """Refuse keys in a URI: it is written into the recipe, the report and every error."""
    scheme, mark, rest = uri.partition("://")
    # The first part holds a ":" only with keys or a port; a key that has a "/" comes in two parts.
    if mark and "@" in rest and ":" in rest.partition("/")[0]:
        raise StorageError(
            f"{scheme}://...: keys do not belong in a URI, which is written into files",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile",
        )


def _flush_and_rename(temporary: str, full: str) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    Path(temporary).replace(full)
