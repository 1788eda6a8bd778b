"""Where calibration and evaluation text comes from."""

import codecs
import contextlib
import hashlib
import itertools
import json
import stat
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from actors.storage.quoting import said, shown
from planners.errors import DataError
from planners.spelling import did_you_mean

NAMED = ("stdlib", "wikitext2", "embedded")  # the last is tokens, and read as such
SPLITS = ("train", "calibration", "evaluation")
MAX_PIECE = 2_000_000  # characters of a text that are handled at a time

_NOT_LIBRARY_CODE = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}
# Files that describe the machine on which the interpreter was built, so no two machines share them.
_WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "config-")
_NUM_BUCKETS = 20
_READ_BYTES = 2**20
_MAX_LINE_BYTES = 2**26
_BATCH_ROWS = 256
_EVALUATION_BUCKETS = (0,)
_CALIBRATION_BUCKETS = (1, 2)

WIKITEXT = "Salesforce/wikitext"  # on the Hub; a file of it stays in the cache of downloads
_WIKITEXT_SPLITS = {"train": "train", "calibration": "train", "evaluation": "test"}
_USE_A_FILE = "download it elsewhere and give a local .txt, .jsonl or .parquet file instead"


def read_texts(source: str, *, split: str) -> Iterator[str]:
    """Return the non-empty texts of ``source``, in an order that never changes.

    A source is one of

    - ``stdlib``: the standard library of the running interpreter, one text a file; the three
      splits share no file;
    - ``wikitext2``: ``train`` and ``calibration`` are its train split, ``evaluation`` its test
      split, each joined into the one text that published perplexities are measured on;
    - a path that ends in ``.txt`` (one text, in pieces where it is long), ``.jsonl`` (key ``text``
      of each line) or ``.parquet`` (column ``text``): the whole file whatever the split, so give
      each its own.

    Raises:
        DataError: at the call if the source is unknown, cannot be opened or holds no text; while
            iterating if a later line or row is wrong.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}", hint=f"one of: {', '.join(SPLITS)}")
    texts = filter(None, _open_source(source, split))
    first = next(texts, None)
    if first is None:
        raise DataError(f"{source}: holds no text", hint="give a source with at least one text")
    return itertools.chain([first], texts)


def _open_source(source: str, split: str) -> Iterator[str]:
    if source == "stdlib":
        return _read_stdlib(split)
    if source == "wikitext2":
        return _read_wikitext2(split)
    path = Path(source)
    reader = _FILE_READERS.get(path.suffix.lower())
    if reader is None:
        what = "is a file of another kind" if path.is_file() else "is no source of text"
        raise DataError(
            f"{shown(source)} {what}" + did_you_mean(source, NAMED),
            hint=f"stdlib, wikitext2, or the path of a file ending in {', '.join(_FILE_READERS)}",
        )
    require_file(path, hint="give the path of an existing local file")
    return reader(path)


def require_file(path: Path, *, hint: str) -> None:
    """See that a path is that of a file.

    Raises:
        DataError: it is not.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # a pipe would be waited for
        if is_file:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file", hint=hint) from error
    except (OSError, ValueError) as error:  # not allowed, too long, or with a NUL in it
        raise DataError(f"{path}: cannot be read: {said(error)}", hint=hint) from error
    if not is_file:
        raise DataError(f"{path}: is not a file", hint=hint)


def _read_stdlib(split: str) -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name, path in sorted(names.items()):
        if _is_library_code(name) and _stdlib_split(name) == split:
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue  # Other encodings are legal in Python files, and too few to matter here.
            yield text


def _is_library_code(name: str) -> bool:
    parts = name.split("/")
    return _NOT_LIBRARY_CODE.isdisjoint(parts) and not parts[0].startswith(_WRITTEN_BY_THE_BUILD)


def _stdlib_split(name: str) -> str:
    # By name, not by position: a file stays in its split when another Python version adds files.
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()) % _NUM_BUCKETS
    if bucket in _EVALUATION_BUCKETS:
        return "evaluation"
    return "calibration" if bucket in _CALIBRATION_BUCKETS else "train"


def _read_wikitext2(split: str) -> Iterator[str]:
    import huggingface_hub  # most runs have no use for it

    from actors.storage.hub import HTTP_ERROR, token_here

    try:
        path = huggingface_hub.hf_hub_download(
            WIKITEXT,
            f"wikitext-2-raw-v1/{_WIKITEXT_SPLITS[split]}-00000-of-00001.parquet",
            repo_type="dataset",
            token=token_here() or False,
        )
    except (HTTP_ERROR, OSError) as error:
        raise DataError(
            f"wikitext2: cannot be downloaded from the Hugging Face hub: {said(error)}",
            hint=_USE_A_FILE,
        ) from error
    yield "\n\n".join(_read_parquet(Path(path)))


def _read_txt(path: Path) -> Iterator[str]:
    rest = ""
    for text in _decoded(path):
        rest += text
        while len(rest) > MAX_PIECE:
            end = piece_end(rest, 0)
            yield rest[:end]
            rest = rest[end:]
    yield rest


def piece_end(text: str, start: int) -> int:
    """Return where the piece of a long text that begins at ``start`` ends: after a line if any."""
    limit = start + MAX_PIECE
    return text.rfind("\n", start, limit) + 1 or limit


def _decoded(path: Path) -> Iterator[str]:
    """Return a UTF-8 file in pieces, so that a large one is never whole in memory."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # editors begin files with a mark
    position = 0
    with _opened(path) as file:
        data = b"more"
        while data:
            data = file.read(_READ_BYTES)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, where=str(path), at=position - pending) from error
            position += len(data)


def _read_jsonl(path: Path) -> Iterator[str]:
    with _opened(path) as file:
        lines = iter(lambda: file.readline(_MAX_LINE_BYTES), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if len(line) == _MAX_LINE_BYTES:
                raise DataError(
                    f"{where}: is longer than {_MAX_LINE_BYTES} bytes",
                    hint="give one document a line",
                )
            if line.strip():
                yield _text_of_line(line, where=where)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _text_of_line(line: bytes, *, where: str) -> str:
    expected = 'each line must be an object such as {"text": "..."}'
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where=where) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {said(error)}", hint=expected) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is a {type(value).__name__}, not an object", hint=expected)
    if "text" not in value:
        keys = shown(list(value)).strip("[]") or "none"
        raise DataError(f"{where}: has no key 'text'; its keys: {keys}", hint=expected)
    text = value["text"]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: key 'text' is a {type(text).__name__}, not a string", hint=expected
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: key 'text' is no text: {said(error)}", hint=expected) from error
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    expected = "the file must have a column `text` of strings without nulls"
    try:
        with pq.ParquetFile(path) as file:
            _check_text_column(file.schema_arrow, path=path, expected=expected)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=["text"])
            rows = (row for batch in batches for row in batch["text"])
            for number, row in enumerate(rows, start=1):
                if not row.is_valid:
                    raise DataError(f"{path}, row {number}: text is null", hint=expected)
                yield row.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(error, where=str(path)) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: is not a readable parquet file: {said(error)}", hint=expected
        ) from error


def _check_text_column(schema: pa.Schema, *, path: Path, expected: str) -> None:
    count = schema.names.count("text")
    if count != 1:
        columns = shown(schema.names).strip("[]") or "none"
        raise DataError(
            f"{path}: has {count or 'no'} column 'text'; its columns: {columns}", hint=expected
        )
    column = schema.field("text").type
    if not (pa.types.is_string(column) or pa.types.is_large_string(column)):
        raise DataError(f"{path}: column 'text' is of type {column}, not string", hint=expected)


def _not_utf8(error: UnicodeDecodeError, *, where: str, at: int = 0) -> DataError:
    return DataError(
        f"{where}: is not UTF-8: {error.reason} at byte {at + error.start}",
        hint="convert it, for example with `iconv -t UTF-8`",
    )


_FILE_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
