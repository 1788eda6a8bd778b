"""Read and write files of a directory, local or on an object store.

Local files are written under a temporary name, flushed to the disk and renamed, so that a file
either is complete or does not exist. On an object store the same holds without renaming: an object
becomes visible when its upload is completed. A read returns all requested bytes, or raises.
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

HASHED_ASIDE = 2**20  # bytes of a piece above which it is hashed in its own thread
BUFFER_BYTES = 2**23  # an object up to this is one request; a larger one is sent in parts this big
PIECE_BYTES = 2**22  # read at a time where the whole file is not needed at once
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A written file: path relative to the root, sha256 in hex, and size in bytes."""

    path: str
    sha256: str
    bytes: int


class HashingStream:
    """Forwards bytes to a stream and computes their sha256 and number.

    Large pieces are hashed in threads while they are written. A piece must not be changed before
    the next one is written or `entry` is called.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self._hashing: list[Thread] = []
        self.bytes = 0

    def write(self, data: Any, *digests: "hashlib._Hash") -> None:
        """Write bytes, or any object with the buffer protocol.

        Args:
            data: the bytes.
            digests: other hashes that are updated with them; complete once the next piece is
                written or `entry` is called.
        """
        self._wait()
        for digest in (self._sha256, *digests):
            if len(data) >= HASHED_ASIDE:
                self._hashing.append(Thread(target=digest.update, args=(data,)))
                self._hashing[-1].start()
            else:
                digest.update(data)
        self._stream.write(data)
        self.bytes += len(data)

    def entry(self, path: str) -> FileEntry:
        """Return the entry of a file of that name with the bytes written so far."""
        self._wait()
        return FileEntry(path=path, sha256=self._sha256.hexdigest(), bytes=self.bytes)

    def _wait(self) -> None:
        for thread in self._hashing:
            thread.join()
        self._hashing = []


class Directory:
    """A directory named by a local path or a URI that ``pyarrow.fs`` understands.

    It can be pickled: only the URI is sent to the other process.
    """

    def __init__(self, uri: str) -> None:
        """Parse the name of a directory; nothing is read or created.

        Raises:
            StorageError: the URI cannot be opened, is not UTF-8, or contains credentials.
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
        require_utf8(root, StorageError)  # resolved, so it may contain another name
        self.root = root.rstrip("/")
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)
        if not self.is_local and not self.root:
            raise StorageError(f"{uri}: has no bucket", hint="for example s3://bucket/folder")

    def __reduce__(self) -> tuple[type["Directory"], tuple[str]]:
        """Return what another process needs to open the same directory."""
        return (Directory, (self.uri,))

    def path(self, name: str) -> str:
        """Return the full path or URI of a file below the root, for messages."""
        return f"{self.root}/{name}" if self.is_local else f"{self.uri.split('?')[0]}/{name}"

    def below(self, folder: str) -> str:
        """Return the URI of a folder inside this directory; a URI's query stays at its end."""
        if "://" not in self.uri:
            return f"{self.root}/{folder}"
        base, mark, query = self.uri.partition("?")
        return f"{base.rstrip('/')}/{folder}{mark}{query}"

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[HashingStream]:
        """Yield a stream for a whole file; the file exists once the block ends without an error.

        Raises:
            StorageError: the file cannot be written.
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
        except BaseException:  # raised again: whatever the error, no partial file is left
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
                data = bytearray(file.size())
                _fill(file, memoryview(data))
                return bytes(data)

        return self._do(name, whole)

    def read_range(self, name: str, start: int, size: int) -> bytearray:
        """Return ``size`` bytes from offset ``start`` in new memory.

        Raises:
            StorageError: it cannot be read, or is shorter than that.
        """
        data = bytearray(size)
        self.read_into(name, start, memoryview(data))
        return data

    def read_into(self, name: str, start: int, data: memoryview) -> None:
        """Fill a buffer with the bytes from offset ``start``.

        Raises:
            StorageError: it cannot be read, or has fewer bytes.
        """

        def part() -> int:
            with self._fs.open_input_file(self._full(name)) as file:
                file.seek(start)
                there: int = min(len(data), max(file.size() - start, 0))
                _fill(file, data[:there])
                return there

        found = self._do(name, part)
        if found != len(data):
            raise StorageError(
                f"{self.path(name)}: got {found} bytes at offset {start}, expected {len(data)}"
            )

    def pieces(self, name: str) -> Iterator[bytearray]:
        """Yield a whole file in pieces, for callers that do not need it in memory at once.

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
                    data = bytearray(size)
                    _fill(file, memoryview(data))
                    return data

                yield self._do(name, piece)

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, or None where it does not exist."""
        info = self._do(name, lambda: self._fs.get_file_info(self._full(name)))
        return int(info.size) if info.type == fs.FileType.File else None

    def key(self, name: str) -> dict[str, Any] | None:
        """Return values that differ once the content of a file differs, without reading it.

        For a local file its inode, size and times, including the time of the last inode change,
        which no program can set; for an object the metadata of its store, including the tag of its
        content. None where the store gives no tag.

        Raises:
            StorageError: there is no such file.
        """
        if self.is_local:
            with self._storage_errors(name):
                found = Path(self._full(name)).stat()  # of a link's target
            return {
                "device": found.st_dev,
                "inode": found.st_ino,
                "bytes": found.st_size,
                "mtime_ns": found.st_mtime_ns,
                "ctime_ns": found.st_ctime_ns,
            }

        def metadata() -> dict[bytes, bytes]:
            with self._fs.open_input_file(self._full(name)) as file:
                return dict(file.metadata() or {})

        facts = {_text(k): _text(v) for k, v in self._do(name, metadata).items()}
        return facts if any(k.lower() == "etag" and v for k, v in facts.items()) else None

    def has_bucket(self) -> bool:
        """Return whether the bucket exists, to tell a missing file from a missing bucket."""
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
        """Return the names of the files and folders directly in the root, sorted."""
        selector = fs.FileSelector(self.root, recursive=False, allow_not_found=True)
        return self._do("", lambda: sorted(i.base_name for i in self._fs.get_file_info(selector)))

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""

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
        """Return the sha256 of a file that its store states, as the Hub does; empty if none.

        The file is not read.
        """
        stated = getattr(self._fs, "stated_sha256", None)
        return "" if stated is None else str(self._do(name, lambda: stated(self._full(name))))

    def _do(self, name: str, action: Callable[[], _T]) -> _T:
        try:
            return attempt(action, where=self.path(name), retry=not self.is_local)
        except UnicodeDecodeError as error:
            found = bytes(error.object).decode(errors="backslashreplace")
            raise StorageError(
                f"{self.path(name)}: contains a file whose name is not UTF-8: {found}",
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
        """Remove the object of an upload that failed in the middle.

        Arrow cannot abort an upload: it completes what it has when the stream is closed, at the
        latest when it is garbage collected. So it is closed here, and the object removed.
        """
        with contextlib.suppress(OSError):
            upload.abandon()
        with contextlib.suppress(StorageError):
            self.delete(name)

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


class _Upload:
    """An upload to an object: buffered while it is small, then sent in parts.

    Buffered bytes can be sent again; the object is not visible before it is complete.
    """

    def __init__(self, open_stream: Callable[[], Any]) -> None:
        self._open = open_stream
        self._held = bytearray()
        self._stream: Any = None

    @property
    def is_streaming(self) -> bool:
        """Whether a part was sent already."""
        return self._stream is not None

    def write(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BUFFER_BYTES):
            self._held += view[start : start + BUFFER_BYTES]
            if len(self._held) > BUFFER_BYTES:
                self._send()

    @property
    def held(self) -> bytes:
        """The bytes that were not sent yet."""
        return bytes(self._held)

    def close(self) -> None:
        """Send the remaining bytes and make the object visible."""
        if self._held:
            self._send()
        self._stream.close()

    def abandon(self) -> None:
        """Send nothing more; the parts that were sent may become visible as an object."""
        if not self._stream.closed:
            self._stream.close()

    def _send(self) -> None:
        if self._stream is None:
            self._stream = self._open()
        held, self._held = bytes(self._held), bytearray()
        self._stream.write(held)


def _text(value: bytes | str) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _fill(file: Any, data: memoryview) -> None:
    """Fill a buffer with the next bytes of a file.

    Where a store's answer is too short but consistent with its own length, Arrow takes it as
    complete and leaves the rest of the buffer unchanged. So the last byte is set to a mark before
    the read and must have changed; if the data ends in that mark, it is read again with the
    opposite one.

    Raises:
        ShortReadError: fewer bytes were received.
    """
    size = len(data)
    if not size:
        return
    begin = file.tell()
    for mark in (0x55, 0xAA):
        data[-1] = mark
        file.seek(begin)
        if file.readinto(data) != size:
            break
        if data[-1] != mark:
            return
    raise ShortReadError(f"received fewer than the {size} requested bytes")


def _refuse_password(uri: str) -> None:
    """Refuse credentials in a URI: it is written to the recipe, the report and every error."""
    scheme, mark, rest = uri.partition("://")
    # The first part has a ":" only with keys or a port; a key with a "/" is split into two parts.
    if mark and "@" in rest and ":" in rest.partition("/")[0]:
        raise StorageError(
            f"{scheme}://...: a URI must not contain credentials, because it is written to files",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a profile",
        )


def _flush_and_rename(temporary: str, full: str) -> None:
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    Path(temporary).replace(full)
