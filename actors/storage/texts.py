"""Read calibration and evaluation text from its sources."""

import hashlib
import itertools
import json
import stat
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from actors.storage.characters import (
    ENDINGS,
    NotDecodedError,
    bare_name,
    characters,
    refuse_packed,
)
from actors.storage.quoting import error_text, shown
from planners.errors import DataError
from planners.spelling import did_you_mean

NAMED = ("stdlib", "wikitext2", "embedded")  # the last has token ids, not text
SPLITS = ("train", "calibration", "evaluation")
MAX_PIECE = 2_000_000  # characters of a text that are processed at a time

_NOT_LIBRARY_CODE = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}
# Files that describe the machine on which the interpreter was built, so they differ everywhere.
_WRITTEN_BY_THE_BUILD = ("_sysconfigdata", "config-")
_NUM_BUCKETS = 20
_MAX_LINE = 2**26  # characters
_BATCH_ROWS = 256
_EVALUATION_BUCKETS = (0,)
_CALIBRATION_BUCKETS = (1, 2)

WIKITEXT = "Salesforce/wikitext"  # on the Hub; its files stay in the download cache
_WIKITEXT_SPLITS = {"train": "train", "calibration": "train", "evaluation": "test"}
_USE_A_FILE = "download it elsewhere and use a local .txt, .jsonl or .parquet file instead"


def read_texts(source: str, *, split: str) -> Iterator[str]:
    """Return the non-empty texts of ``source``, in an order that never changes.

    A source is one of

    - ``stdlib``: the standard library of the running interpreter, one text per file; the three
      splits share no file;
    - ``wikitext2``: ``train`` and ``calibration`` are its train split, ``evaluation`` its test
      split, each joined into one text, the one on which published perplexities are measured;
    - a path that ends in ``.txt`` (one text, in pieces where it is long), ``.jsonl`` (key ``text``
      of each line) or ``.parquet`` (column ``text``): the whole file for every split, so use a
      different file for each. The first two may be compressed, such as ``.txt.gz`` or
      ``.jsonl.zst``, and are UTF-8, or UTF-16 or UTF-32 with a byte order mark
      (`actors.storage.characters`).

    Raises:
        DataError: at the call if the source is unknown, cannot be opened or contains no text; while
            iterating if a later line or row is invalid.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}", hint=f"one of: {', '.join(SPLITS)}")
    texts = filter(None, _open_source(source, split))
    first = next(texts, None)
    if first is None:
        raise DataError(f"{source}: contains no text", hint="give a source with at least one text")
    return itertools.chain([first], texts)


def _open_source(source: str, split: str) -> Iterator[str]:
    if source == "stdlib":
        return _read_stdlib(split)
    if source == "wikitext2":
        return _read_wikitext2(split)
    if "://" in source:
        raise DataError(
            f"{shown(source)}: text is read from local files only",
            hint="copy it to this machine and give the path of the copy",
        )
    path = Path(source)
    reader = _FILE_READERS.get(Path(bare_name(path)).suffix.lower())
    if reader is None:
        what = "is not a supported file type" if path.is_file() else "is not a text source"
        raise DataError(
            f"{shown(source)} {what}" + did_you_mean(source, NAMED),
            hint="use stdlib, wikitext2, or the path of a file ending in "
            f"{', '.join(_FILE_READERS)}, optionally followed by {', '.join(ENDINGS)}",
        )
    require_file(path, hint="give the path of an existing local file")
    return reader(path)


def require_file(path: Path, *, hint: str) -> None:
    """Raise unless a path is that of a readable file.

    Raises:
        DataError: it is not.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # opening a pipe would block
        if is_file:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{path}: no such file", hint=hint) from error
    except (OSError, ValueError) as error:  # permission denied, name too long, or a NUL in it
        raise DataError(f"{path}: cannot be read: {error_text(error)}", hint=hint) from error
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
                continue  # other encodings are legal in Python files, but too rare to matter here
            yield text


def _is_library_code(name: str) -> bool:
    parts = name.split("/")
    return _NOT_LIBRARY_CODE.isdisjoint(parts) and not parts[0].startswith(_WRITTEN_BY_THE_BUILD)


def _stdlib_split(name: str) -> str:
    # By name, not by position, so that a file stays in its split when a Python version adds files.
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()) % _NUM_BUCKETS
    if bucket in _EVALUATION_BUCKETS:
        return "evaluation"
    return "calibration" if bucket in _CALIBRATION_BUCKETS else "train"


def _read_wikitext2(split: str) -> Iterator[str]:
    import huggingface_hub  # most runs do not need it

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
            f"wikitext2: cannot be downloaded from the Hugging Face Hub: {error_text(error)}",
            hint=_USE_A_FILE,
        ) from error
    yield "\n\n".join(_read_parquet(Path(path)))


def _read_txt(path: Path) -> Iterator[str]:
    rest = ""
    try:
        for text in characters(path):
            rest += text
            while len(rest) > MAX_PIECE:
                end = piece_end(rest, 0)
                yield rest[:end]
                rest = rest[end:]
    except NotDecodedError as error:
        raise DataError(f"{path}: {error.problem}", hint=error.hint) from error
    yield rest


def piece_end(text: str, start: int) -> int:
    """Return the end of the piece of a long text that begins at ``start``, after a line if any."""
    limit = start + MAX_PIECE
    return text.rfind("\n", start, limit) + 1 or limit


def _read_jsonl(path: Path) -> Iterator[str]:
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            if line.strip():
                yield _text_of_line(line, where=f"{path}, line {number}")
    except NotDecodedError as error:
        raise DataError(f"{path}, line {number + 1}: {error.problem}", hint=error.hint) from error


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file; raise on one that is longer than `_MAX_LINE` characters."""
    number, length = 1, 0
    begun: list[str] = []
    for piece in characters(path):
        first, *others = piece.split("\n")
        begun.append(first)
        length += len(first)
        for other in others:
            yield "".join(begun)
            number, begun, length = number + 1, [other], len(other)
        if length > _MAX_LINE:
            raise DataError(
                f"{path}, line {number}: is longer than {_MAX_LINE} characters",
                hint="put one document on each line",
            )
    yield "".join(begun)


def _text_of_line(line: str, *, where: str) -> str:
    expected = 'each line must be an object such as {"text": "..."}'
    try:
        value = json.loads(
            line.removeprefix("\ufeff")
        )  # a byte order mark, as in concatenated files
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is not JSON: {error_text(error)}", hint=expected) from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: is {_JSON[type(value)]}, not an object", hint=expected)
    if "text" not in value:
        keys = shown(list(value)).strip("[]") or "none"
        raise DataError(f"{where}: has no key 'text'; its keys: {keys}", hint=expected)
    text = value["text"]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: key 'text' is {_JSON[type(text)]}, not a string",
            hint=f"{expected}; remove lines without text",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: key 'text' is not valid text: {error_text(error)}", hint=expected
        ) from error
    return text


def _read_parquet(path: Path) -> Iterator[str]:
    refuse_packed(path)
    try:
        with pq.ParquetFile(path) as file:
            _check_text_column(file.schema_arrow, path=path)
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=["text"])
            rows = (row for batch in batches for row in batch["text"])
            for number, row in enumerate(rows, start=1):
                yield _text_of_row(row, where=f"{path}, row {number}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: is not a readable parquet file: {error_text(error)}", hint=_COLUMN
        ) from error


def _text_of_row(row: pa.Scalar, *, where: str) -> str:
    try:
        text = row.as_py()
        # Some writers do not mark bytes as a string.
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: is not UTF-8: {error.reason} at byte {error.start}",
            hint="decode it with its actual encoding, and write the column as strings",
        ) from error
    if text is None:
        raise DataError(
            f"{where}: text is null", hint=f"{_COLUMN}, without nulls: remove rows without text"
        )
    return str(text)


def _check_text_column(schema: pa.Schema, *, path: Path) -> None:
    count = schema.names.count("text")
    if count != 1:
        columns = shown(schema.names).strip("[]") or "none"
        raise DataError(
            f"{path}: has {count or 'no'} column 'text'; its columns: {columns}",
            hint=f"{_COLUMN}: rename the column that contains the text",
        )
    column = schema.field("text").type
    if not any(holds(_stored(column)) for holds in _STRINGS):
        rows = (
            ": `df.explode('text')` in pandas gives one per row" if pa.types.is_list(column) else ""
        )
        raise DataError(
            f"{path}: column 'text' is of type {shown(str(column))[1:-1]}, not string",
            hint=_COLUMN + rows,
        )


def _stored(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, without a dictionary encoding."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


_COLUMN = "the file must have one column `text` of strings"
_STRINGS = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
)
_JSON: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
}
_FILE_READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
