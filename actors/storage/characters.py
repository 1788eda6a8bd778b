"""Read the characters of a text file, whatever its compression and encoding."""

import codecs
import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from actors.storage.quoting import error_text
from planners.errors import DataError

ENDINGS = (".gz", ".zst", ".bz2", ".lz4")  # may follow the suffix of the content, as in .txt.gz

_READ_BYTES = 2**20
_HEAD_BYTES = 4096  # from which the format is detected
_FEW_BYTES = 64  # too few to guess an encoding from
_LANES = 4  # bytes of the widest character

# Compression -> the first bytes of such a file, and the command that decompresses it. No UTF-8 text
# can begin with any of these.
_PACKINGS = {
    "gzip": (rb"\x1f\x8b\x08", "gzip -dc"),
    "zstd": (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "zstd -dc"),
    "bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2 -dc"),
    "lz4": (rb"\x04\x22\x4d\x18", "lz4 -dc"),
    "xz": (rb"\xfd7zXZ\x00", "xz -dc"),
    "zip": (rb"PK\x03\x04", "unzip -p"),
    "7z": (rb"7z\xbc\xaf\x27\x1c", "7z e -so"),
}
_STREAMED = ("gzip", "zstd", "bz2", "lz4")  # decompressed by pyarrow
_PARQUET = re.compile(rb"PAR1[\x00-\x1f]")
_MARKS = (  # UTF-32LE before UTF-16LE, with whose mark it begins
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
    (codecs.BOM_UTF8, "UTF-8"),
)
# Which bytes of every four are NUL where a text is mostly ASCII.
_UNMARKED: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
}


class NotDecodedError(Exception):
    """A file is not valid in its detected encoding.

    Attributes:
        problem: what is wrong, and at which byte of the decompressed text.
        hint: what to do.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(problem)
        self.problem, self.hint = problem, hint


def bare_name(path: Path) -> str:
    """Return the name of a file without the suffix of its compression."""
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def packing_of(head: bytes) -> str:
    """Return the compression of a file from its first bytes; empty where there is none."""
    for name, (magic, _) in _PACKINGS.items():
        if re.match(magic, head):
            return name
    return ""


def characters(path: Path) -> Iterator[str]:
    """Yield the text of a file in pieces, so that a large one is never fully in memory.

    The compression is detected from the first bytes, not from the name: gzip, zstd, bz2 and lz4
    are decompressed while reading. The encoding is UTF-8, or UTF-16 or UTF-32 with a byte order
    mark, which is not part of the text.

    Raises:
        DataError: the file cannot be read, or has an unsupported compression.
        NotDecodedError: while iterating, after the text before the invalid byte.
    """
    with _unpacked(path) as (file, packing):
        head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]  # type: ignore[attr-defined]  # buffered
        if _PARQUET.match(head):
            raise DataError(
                f"{path}: is a parquet file", hint="rename it so that it ends in .parquet"
            )
        if inner := packing_of(head):
            raise _cannot_unpack(path, f"{inner} in {packing}" if packing else inner, packing)
        mark, encoding = next((m for m in _MARKS if head.startswith(m[0])), (b"", "UTF-8"))
        guessed = "" if mark else _unmarked(head)
        if guessed:
            raise NotDecodedError(
                f"is not UTF-8: it looks like {guessed} without a byte order mark",
                hint=f"convert it: `{_conversion(path, packing, guessed)}`",
            )
        file.read(len(mark))
        yield from _decoded(file, path, packing, encoding=encoding, position=len(mark))


def _decoded(
    file: BinaryIO, path: Path, packing: str, *, encoding: str, position: int
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)()
    ascii_only = True
    data = b"more"
    while data:
        data = file.read(_READ_BYTES)
        pending = len(decoder.getstate()[0])
        try:
            piece = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            before = error.object[: error.start].decode(encoding)
            yield before
            raise NotDecodedError(
                f"is not {encoding}: {error.reason} at byte {position - pending + error.start}",
                hint=_remedy(
                    path, packing, encoding, ascii_only=ascii_only and before.isascii(),
                    ends=error.reason.startswith(("unexpected end", "truncated")),
                ),
            ) from error  # fmt: skip
        ascii_only = ascii_only and piece.isascii()
        yield piece
        position += len(data)


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """Yield the bytes of a file, decompressed while reading, and the name of its compression."""
    packing = ""
    try:
        with path.open("rb") as file:
            packing = packing_of(file.peek(_HEAD_BYTES))
            if packing not in _STREAMED:
                yield file, ""
                return
            with pa.CompressedInputStream(file, packing) as stream:
                yield io.BufferedReader(stream), packing
    except (OSError, pa.ArrowException) as error:
        if not packing:
            strerror = getattr(error, "strerror", None)
            raise DataError(f"{path}: cannot be read: {strerror or error}") from error
        raise DataError(
            f"{path}: cannot be decompressed as {packing}: {error_text(error)}",
            hint=f"download it again, or use the output of `{_unpack(path, packing)}`",
        ) from error


def _cannot_unpack(path: Path, what: str, packing: str) -> DataError:
    command = _unpack(path, packing or what)
    target = shlex.quote(str(path.with_name(f"unpacked-{bare_name(path)}")))
    return DataError(
        f"{path}: is compressed with {what}, which is not supported here",
        hint=f"decompress it first: `{command} > {target}`",
    )


def refuse_packed(path: Path) -> None:
    """Refuse a compressed file: a format that is read by byte range cannot be decompressed first.

    Raises:
        DataError: the file is compressed, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            packing = packing_of(file.read(_HEAD_BYTES))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if packing:
        raise _cannot_unpack(path, packing, "")


def _unmarked(head: bytes) -> str:
    """Return the encoding that the pattern of NUL bytes suggests; empty where it suggests none."""
    if len(head) < _FEW_BYTES:
        return ""
    lanes = [head[i::_LANES] for i in range(_LANES)]
    return _UNMARKED.get(tuple(lane.count(0) > len(lane) / 2 for lane in lanes), "")


def _remedy(path: Path, packing: str, encoding: str, *, ascii_only: bool, ends: bool) -> str:
    if encoding != "UTF-8" or ends or not ascii_only:
        command = _conversion(path, packing, encoding, flags="-c ")
        return (
            f"everything before it is valid {encoding}, so the file is damaged there; "
            f"`{command}` skips the damaged bytes"
        )
    command = _conversion(path, packing, "LATIN1")
    return f"convert it: `{command}` if it is Latin-1; for another encoding, change the value of -f"


def _conversion(path: Path, packing: str, encoding: str, *, flags: str = "") -> str:
    target = shlex.quote(str(path.with_name(f"utf8-{bare_name(path)}")))
    if packing:
        return f"{_unpack(path, packing)} | iconv {flags}-f {encoding} -t UTF-8 > {target}"
    source = shlex.quote(str(path))
    return f"iconv {flags}-f {encoding} -t UTF-8 {source} > {target}"


def _unpack(path: Path, packing: str) -> str:
    return f"{_PACKINGS[packing][1]} {shlex.quote(str(path))}"
