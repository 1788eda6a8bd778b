"""Tokenise text for calibration and evaluation; store and hash the tokens."""

import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import os
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from actors.storage.copies import MAX_TOKENIZER_BYTES, local_tokenizer
from actors.storage.quoting import error_text, shown
from actors.storage.sources import embedded_model
from actors.storage.texts import MAX_PIECE, piece_end, read_texts, require_file
from planners.errors import DataError

Tokens = NDArray[np.int64]

MAX_DEFAULT_SEQUENCES = 128
_TENSOR = "input_ids"
_MIN_CHARACTERS = 2_000_000  # of text that are tokenised, if available, however few are needed
_MIN_SURPLUS = 4  # times the needed tokens
_MIN_LENGTH = 2  # the first token is not predicted
_NUM_AXES = 2
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s*$")  # one of its lines; SentencePiece is binary
_LINE_BYTES = 1024
_OTHERWISE = "or add its tokenizer.json, or use tokens:FILE.safetensors"
_PACKED = "one int64 tensor input_ids of shape (sequences, tokens)"


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenFile:
    """A written file of tokens.

    Attributes:
        path: relative to the run directory.
        sha256: `tokens_hash` of them.
        num_sequences: rows.
        sequence_length: tokens of each, BOS included.
        source: as the user gave it.
    """

    path: str
    sha256: str
    num_sequences: int
    sequence_length: int
    source: str


class Tokenizer(Protocol):
    """The part of transformers' tokenizers that is used here: their classes are slow to import."""

    bos_token_id: int | None

    def __call__(
        self, text: str, *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[int]]:
        """Return ``input_ids`` of one text."""


def token_file(tokens: Tokens, path: str, *, source: str) -> TokenFile:
    """Return the description of tokens, shape (sequences, tokens), stored at ``path``."""
    num_sequences, sequence_length = tokens.shape
    return TokenFile(
        path=path,
        sha256=tokens_hash(tokens),
        num_sequences=num_sequences,
        sequence_length=sequence_length,
        source=source,
    )


def prepare_tokens(  # noqa: PLR0913 -- all of it decides the bytes
    source: str,
    *,
    split: str,
    tokenizer_uri: str,
    vocab_size: int,
    sequence_length: int | None,
    num_sequences: int | None,
    bos: bool,
    seed: int,
    fewer: bool = False,
) -> Tokens:
    """Return the token ids of a source, shape (sequences, tokens), without padding.

    - ``tokens:FILE.safetensors``: exactly as they are, in order; the first ``num_sequences``.
      Neither tokenizer nor ``sequence_length`` matters.
    - ``embedded``: those that come with the model tiny, in order; ``sequence_length`` may cut them.
    - any other source is text (`actors.storage.texts.read_texts`): tokenised text by text without
      special tokens, concatenated, and cut into pieces, of which ``num_sequences`` are drawn by
      ``seed`` without replacement and kept in order. A sequence is BOS, if requested and known to
      the tokenizer, and a piece. Reading stops at 4 times the needed tokens, not before 2 million
      characters, so the rest of a long text is never drawn.

    Args:
        source: see above.
        split: ``calibration`` or ``evaluation``.
        tokenizer_uri: directory of the model.
        vocab_size: all ids are below it.
        sequence_length: tokens per sequence, BOS included; required for text.
        num_sequences: None means all sequences of a token file; of text as many as there are, up
            to 128, but all of the evaluation split of ``wikitext2``, as published results use.
        bos: text sequences begin with BOS.
        seed: of the choice.
        fewer: as many as there are will do, if they are fewer than ``num_sequences``.

    Raises:
        DataError: the source or the tokenizer is missing or broken, has too few tokens, or does
            not fit the model.
    """
    if sequence_length is not None and sequence_length < _MIN_LENGTH:
        raise DataError(
            f"{split}: a sequence of {sequence_length} tokens predicts nothing; give 2 or more"
        )
    if source.startswith("tokens:"):
        path = Path(os.path.expanduser(source.removeprefix("tokens:")))  # noqa: PTH111 unlike Path's, never raises
        tokens = _read_tokens(path, num_sequences=None if fewer else num_sequences)
        tokens = tokens[:num_sequences]
    elif source == "embedded":
        with local_tokenizer(tokenizer_uri) as folder:
            _check_embedded_fits(folder)
        tokens = _read_tokens(
            embedded_model() / f"{split}.safetensors", num_sequences=num_sequences
        )
        tokens = _cut(tokens, sequence_length)
    elif sequence_length is None:
        raise DataError(f"{source}: text needs a sequence length")
    else:
        with local_tokenizer(tokenizer_uri) as folder:
            tokenizer = load_tokenizer(folder)
        bos_id = tokenizer.bos_token_id if bos else None
        piece = sequence_length - (bos_id is not None)
        use_all = num_sequences is None and source == "wikitext2" and split == "evaluation"
        enough = math.inf if use_all else (num_sequences or MAX_DEFAULT_SEQUENCES) * piece
        texts = read_texts(source, split=split)
        stream = _tokenise(texts, _guarded(tokenizer, tokenizer_uri), enough=enough)
        if num_sequences is None and not use_all:
            num_sequences = min(max(len(stream) // piece, 1), MAX_DEFAULT_SEQUENCES)
        if fewer and num_sequences is not None:
            num_sequences = min(max(len(stream) // piece, 1), num_sequences)
        tokens = pack(
            stream,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            bos_id=bos_id,
            seed=seed,
            where=source,
        )
    _check_ids(tokens, vocab_size, where=source)
    return tokens


def pack(
    stream: Tokens,
    *,
    sequence_length: int,
    num_sequences: int | None,
    bos_id: int | None,
    seed: int,
    where: str,
) -> Tokens:
    """Return sequences cut from a stream of ids, shape (sequences, tokens).

    Each is ``bos_id``, if there is one, and the tokens of one piece; pieces do not overlap and the
    rest at the end of the stream is dropped. ``num_sequences`` pieces are drawn without replacement
    and kept in order; None uses all.

    Raises:
        DataError: the stream has too few tokens; the message has the number of sequences in it.
    """
    piece = sequence_length - (bos_id is not None)
    available = len(stream) // piece
    if available == 0:
        raise DataError(
            f"{where}: has {len(stream)} tokens, but one sequence needs {piece}",
            hint="give more text, or use shorter sequences",
        )
    _check_enough(available, num_sequences, sequence_length=sequence_length, where=where)
    pieces = stream[: available * piece].reshape(available, piece)
    if num_sequences is not None:
        drawn = np.random.default_rng(seed).choice(available, size=num_sequences, replace=False)
        pieces = pieces[np.sort(drawn)]
    if bos_id is None:
        return pieces.copy()
    return np.concatenate([np.full((len(pieces), 1), bos_id, dtype=np.int64), pieces], axis=1)


def tokens_hash(tokens: Tokens) -> str:
    """Return the sha256 of shape and ids as little-endian int64."""
    digest = hashlib.sha256(np.array(tokens.shape, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(tokens, dtype="<i8").tobytes())
    return digest.hexdigest()


def tokens_to_parquet(tokens: Tokens, metadata: Mapping[str, str]) -> bytes:
    """Return a parquet file with one row per sequence and a column ``input_ids`` (list of int32).

    Its metadata are ``metadata``, e.g. ``source``, and ``sequence_length`` and ``sha256``
    (`tokens_hash`), which `tokens_from_parquet` checks.
    """
    num_sequences, length = tokens.shape
    offsets = np.arange(num_sequences + 1, dtype=np.int32) * length
    rows = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(tokens.reshape(-1).astype(np.int32))
    )
    own = {"sequence_length": str(length), "sha256": tokens_hash(tokens)}
    table = pa.table({_TENSOR: rows}).replace_schema_metadata({**metadata, **own})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data: bytes = sink.getvalue().to_pybytes()
    return data


def tokens_from_parquet(data: bytes) -> Tokens:
    """Return the token ids that `tokens_to_parquet` wrote, shape (sequences, tokens).

    Raises:
        DataError: the bytes are not such a file, or do not match its hash.
    """
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"stored tokens: not a readable parquet file: {error}") from error
    metadata = table.schema.metadata or {}
    length = metadata.get(b"sequence_length", b"")
    columns = {field.name: field.type for field in table.schema}
    if columns != {_TENSOR: pa.list_(pa.int32())} or not length.isdigit():
        raise DataError(f"stored tokens: not written by this program; the columns are {columns}")
    rows = table.column(_TENSOR).combine_chunks()
    flat = rows.flatten().to_numpy(zero_copy_only=False)
    if flat.size != table.num_rows * int(length):
        raise DataError("stored tokens: the rows do not have the length stated in the file")
    tokens: Tokens = flat.astype(np.int64).reshape(table.num_rows, int(length))
    if tokens_hash(tokens).encode() != metadata.get(b"sha256"):
        raise DataError("stored tokens: do not match the hash stated in the file")
    return tokens


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer in a model directory, without running code that comes with it.

    Raises:
        DataError: there is none, it is broken, or a package it needs is not installed.
    """
    _check_size(directory)
    _check_vocabulary(directory)
    transformers: Any = importlib.import_module(
        "transformers"
    )  # takes seconds; not needed for token files
    with _Broken(directory):
        tokenizer: Tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer(string.printable, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:  # without a vocabulary, transformers returns one with special tokens only
        kind = type(tokenizer).__name__
        raise _no_tokenizer(directory, f"{kind} finds no vocabulary in its files")
    return tokenizer


def _check_vocabulary(directory: Path) -> None:
    """Raise unless there is a vocabulary, and the package that reads it if it is not JSON."""
    if not any((directory / name).is_file() for name in _VOCABULARIES):
        raise _no_tokenizer(directory, f"it has none of {', '.join(_VOCABULARIES)}")
    path = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not path.is_file():
        return
    with path.open("rb") as file:
        package = "tiktoken" if _TIKTOKEN.match(file.readline(_LINE_BYTES)) else "sentencepiece"
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"{directory}: its only tokenizer file is tokenizer.model, which needs the package "
            f"{package}, and that is not installed",
            hint=f"pip install {package}, {_OTHERWISE}",
        )


def _no_tokenizer(directory: Path | str, why: str) -> DataError:
    return DataError(
        f"{directory}: has no tokenizer that can be loaded: {why}",
        hint=_OTHERWISE.removeprefix("or "),
    )


def _check_size(directory: Path) -> None:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"):
        path = directory / name
        if path.is_file() and path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise DataError(
                f"{path}: is {path.stat().st_size} bytes, too large for a tokenizer (limit "
                f"{MAX_TOKENIZER_BYTES})"
            )


class _Broken:
    """Converts errors of a broken tokenizer into a DataError that names its directory.

    No ``except`` clause can do this: the Rust part raises the bare class Exception, and a clause
    for that would hide our own bugs as well.
    """

    _KINDS = (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        RecursionError,
    )

    def __init__(self, directory: Path | str) -> None:
        self._directory = directory

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and (kind is Exception or isinstance(error, self._KINDS)):
            raise _no_tokenizer(self._directory, error_text(error)) from error


def _guarded(tokenizer: Tokenizer, directory: str) -> Callable[[str], Tokens]:
    """Return a function from text to ids whose errors name the directory of the tokenizer."""

    def ids(text: str) -> Tokens:
        with _Broken(directory):
            encoded = tokenizer(text, add_special_tokens=False, verbose=False)
            return np.array(encoded["input_ids"], dtype=np.int64)

    return ids


def _tokenise(texts: Iterable[str], ids_of: Callable[[str], Tokens], *, enough: float) -> Tokens:
    """Return the concatenated ids of the texts, reading as many as `prepare_tokens` describes."""
    parts: list[Tokens] = []
    num_tokens = num_characters = 0
    for text in itertools.chain.from_iterable(map(_pieces, texts)):
        parts.append(ids_of(text))
        num_tokens += len(parts[-1])
        num_characters += len(text)
        if num_tokens >= _MIN_SURPLUS * enough and num_characters >= _MIN_CHARACTERS:
            break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most 2 million characters, cut after a line where possible."""
    start = 0
    while len(text) - start > MAX_PIECE:
        end = piece_end(text, start)
        yield text[start:end]
        start = end
    yield text[start:]


def _read_tokens(path: Path, *, num_sequences: int | None) -> Tokens:
    """Return the first sequences of a file of tokens, or all."""
    require_file(path, hint=f"a .safetensors file with {_PACKED}")
    try:
        with safe_open(path, framework="numpy") as file:
            available, length = _checked_shape(file, path)
            _check_enough(available, num_sequences, sequence_length=length, where=str(path))
            tokens: Tokens = file.get_slice(_TENSOR)[: num_sequences or available]
            return tokens
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path}: is not a readable .safetensors file: {error_text(error)}",
            hint=f"it must contain {_PACKED}",
        ) from error


def _checked_shape(file: Any, path: Path) -> tuple[int, int]:
    """Return (sequences, tokens) of an open file of tokens."""
    names = sorted(file.keys())
    if names != [_TENSOR]:
        raise DataError(
            f"{path}: contains the tensors {shown(', '.join(names))[1:-1] or '(none)'}",
            hint=f"it must contain {_PACKED}, and nothing else",
        )
    rows = file.get_slice(_TENSOR)
    shape, dtype = rows.get_shape(), rows.get_dtype()
    if dtype != "I64" or len(shape) != _NUM_AXES or shape[0] < 1 or shape[1] < _MIN_LENGTH:
        raise DataError(
            f"{path}: input_ids is {dtype} of shape {tuple(shape)}",
            hint=f"it must be {_PACKED}, with at least one sequence of at least 2 tokens",
        )
    return shape[0], shape[1]


def _check_enough(available: int, asked: int | None, *, sequence_length: int, where: str) -> None:
    if asked is not None and asked > available:
        raise DataError(
            f"{where}: has {available} sequences of {sequence_length} tokens, not {asked}",
            hint=f"use at most {available}",
        )


def _check_ids(tokens: Tokens, vocab_size: int, *, where: str) -> None:
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or largest >= vocab_size:
        raise DataError(
            f"{where}: has token id {smallest if smallest < 0 else largest}, but the model's ids "
            f"are 0 to {vocab_size - 1}",
            hint="use the tokens or the tokenizer of this model",
        )


def _cut(tokens: Tokens, sequence_length: int | None) -> Tokens:
    """Return the first tokens of each sequence."""
    longest = tokens.shape[1]
    if sequence_length is not None and sequence_length > longest:
        raise DataError(
            f"embedded: its sequences have {longest} tokens, not {sequence_length}",
            hint=f"use at most {longest}, or text such as stdlib",
        )
    return np.ascontiguousarray(tokens[:, :sequence_length])


def _check_embedded_fits(directory: Path) -> None:
    """Refuse a model with a different tokenizer; one without any is accepted."""
    _check_size(directory)
    path = directory / "tokenizer.json"
    if path.is_file() and _vocabulary(path) != _vocabulary(embedded_model() / "tokenizer.json"):
        raise DataError(
            f"embedded: has tokens of the model tiny, but {directory} has a different tokenizer",
            hint="use stdlib, wikitext2, or a file",
        )


def _vocabulary(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())["model"]["vocab"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: is not a tokenizer: {error_text(error)}") from error
