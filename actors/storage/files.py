"""One place where bytes go in and out: a directory, local or on an object store.

Local files are written under a temporary name, flushed to the disk and renamed, so that a name
either holds all its bytes or does not exist. On an object store the object becomes visible when its
stream is closed, which says the same; nothing is ever renamed there.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from pyarrow import fs

from actors.storage.quoting import shown
from planners.errors import StorageError


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """A file as it was written: path below the root, sha256 in hex, and bytes."""

    path: str
    sha256: str
    bytes: int


class HashingStream:
    """Passes bytes on and keeps their sha256 and number."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.bytes = 0

    def write(self, data: Any) -> None:
        """Write bytes, or anything that shows its memory as bytes."""
        self._stream.write(data)
        self._sha256.update(data)
        self.bytes += len(data)

    def entry(self, path: str) -> FileEntry:
        """Return what was written so far as a file of that name."""
        return FileEntry(path=path, sha256=self._sha256.hexdigest(), bytes=self.bytes)


class Directory:
    """A directory named by a local path or a URI that ``pyarrow.fs`` understands.

    It can be sent to another process: only the URI travels.
    """

    def __init__(self, uri: str) -> None:
        """Name a directory; nothing is read or created.

        Raises:
            StorageError: the URI is not one that can be opened, or it holds a password.
        """
        _refuse_password(uri)
        try:
            if "://" in uri:
                self._fs, root = fs.FileSystem.from_uri(uri)
                self.uri = uri
            else:
                self._fs, root = fs.LocalFileSystem(), str(Path(uri).expanduser().resolve())
                self.uri = root  # a process elsewhere has another working directory
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~nobody, or a loop.
            raise StorageError(f"{shown(uri)[1:-1]}: {_reason(error)}") from error
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
        full = f"{self.root}/{name}"
        temporary = f"{full}.{uuid4().hex[:12]}.tmp" if self.is_local else full
        with _as_storage_error(self.path(name)):
            if self.is_local:
                self._fs.create_dir(full.rpartition("/")[0], recursive=True)
            stream = self._fs.open_output_stream(temporary, compression=None)
            try:
                hashing = HashingStream(stream)
                yield hashing
                stream.close()
                if self.is_local:
                    _flush_and_rename(temporary, full)
            except BaseException:
                if self.is_local:
                    with contextlib.suppress(OSError):  # of what could not be flushed
                        stream.close()
                    Path(temporary).unlink(missing_ok=True)
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
        with _as_storage_error(self.path(name)), self._fs.open_input_file(self._full(name)) as file:
            return bytes(file.read())

    def read_range(self, name: str, start: int, size: int) -> bytearray:
        """Return ``size`` bytes from ``start`` on, in memory of their own.

        Raises:
            StorageError: it cannot be read, or is shorter than that.
        """
        with _as_storage_error(self.path(name)), self._fs.open_input_file(self._full(name)) as file:
            data = bytearray(size)
            file.seek(start)
            got = file.readinto(data)
        if got != size:
            raise StorageError(
                f"{self.path(name)}: {got} bytes at {start} where {size} were expected"
            )
        return data

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is none."""
        with _as_storage_error(self.path(name)):
            info = self._fs.get_file_info(self._full(name))
        return int(info.size) if info.type == fs.FileType.File else None

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files below a folder, sorted; none where it does not exist."""
        selector = fs.FileSelector(
            self._full(folder).rstrip("/"), recursive=True, allow_not_found=True
        )
        with _as_storage_error(self.path(folder)):
            infos = self._fs.get_file_info(selector)
        start = len(self.root) + 1
        return sorted(i.path[start:] for i in infos if i.type == fs.FileType.File)

    def entries(self) -> list[str]:
        """Return the names of the files and folders that lie directly in the root, sorted."""
        selector = fs.FileSelector(self.root, recursive=False, allow_not_found=True)
        with _as_storage_error(self.path("")):
            return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        with _as_storage_error(self.path(name)):
            if self.size(name) is not None:
                self._fs.delete_file(self._full(name))

    def sha256(self, name: str) -> str:
        """Return the hash of a file's bytes, read in pieces."""
        digest = hashlib.sha256()
        with _as_storage_error(self.path(name)), self._fs.open_input_file(self._full(name)) as file:
            while piece := file.read(1 << 22):
                digest.update(piece)
        return digest.hexdigest()

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


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


@contextlib.contextmanager
def _as_storage_error(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"{path}: there is no such file") from error
    except OSError as error:
        raise StorageError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the last clause of a library's message: the cause, without its call stack."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "No space left" in text:
        return "no space left on the disk"
    return "permission denied" if "Permission denied" in text else text
