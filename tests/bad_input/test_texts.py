"""Tokens, texts and tokenizers of strangers: refused by the file, and by the line if there is."""

import base64
import contextlib
import gzip
import json
import lzma
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file

from actors.storage import tokens
from actors.storage.texts import read_texts
from planners.errors import ConfigError, DataError
from tests.bad_input.refusals import attempt
from tests.bad_input.test_headers import Payload

IDS = np.arange(48, dtype=np.int64).reshape(2, 24)


@pytest.fixture
def source(tmp_path):
    """Return a function that writes a file and returns its path."""

    def write(name, data):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def sound_text():
    return "".join(f"line {i} of a text that is long enough\n" for i in range(400))


TOKENS = {
    "no tensors": ({}, "contains the tensors (none)"),
    "another name": ({"ids": IDS}, "contains the tensors ids"),
    "two tensors": ({"input_ids": IDS, "mask": IDS}, "contains the tensors input_ids, mask"),
    "int32": ({"input_ids": IDS.astype(np.int32)}, "input_ids is I32 of shape (2, 24)"),
    "floats": ({"input_ids": IDS.astype(np.float32)}, "input_ids is F32 of shape (2, 24)"),
    "one dim": ({"input_ids": IDS.reshape(-1)}, "input_ids is I64 of shape (48,)"),
    "three dims": ({"input_ids": IDS[None]}, "input_ids is I64 of shape (1, 2, 24)"),
    "no sequences": ({"input_ids": IDS[:0]}, "input_ids is I64 of shape (0, 24)"),
    "no tokens": ({"input_ids": IDS[:, :0]}, "input_ids is I64 of shape (2, 0)"),
    "one token": ({"input_ids": IDS[:, :1].copy()}, "input_ids is I64 of shape (2, 1)"),
    "a negative id": ({"input_ids": IDS - 1}, "has token id -1, but the model's ids are 0 to 511"),
    "an id too large": ({"input_ids": IDS + 480}, "has token id 527, but the model's ids are 0"),
    "a huge id": ({"input_ids": IDS + 2**62}, "but the model's ids are 0 to 511"),
}


@pytest.mark.parametrize("case", TOKENS)
def test_wrong_tokens_are_refused(refused, tmp_path, case):
    tensors, words = TOKENS[case]
    save_file(tensors, tmp_path / "ids.safetensors")
    refused(DataError, words, calibration__source=f"tokens:{tmp_path}/ids.safetensors")


def test_tokens_longer_than_the_model_takes_are_refused(refused, tmp_path):
    save_file({"input_ids": np.zeros((2, 41), np.int64)}, tmp_path / "ids.safetensors")
    words = "calibration.source: has sequences of 41 tokens, but the model accepts at most 40"
    refused(ConfigError, words, calibration__source=f"tokens:{tmp_path}/ids.safetensors")


def test_more_tokens_than_there_are_are_refused_with_how_many_there_are(refused):
    words = ("has 20 sequences of 24 tokens, not 21", "use at most 20")
    refused(DataError, *words, calibration__sequences=21)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{}!"], ids=["empty", "huge", "padded"]
)
def test_a_broken_token_file_is_refused(refused, source, data):
    path = source("ids.safetensors", data)
    refused(DataError, f"{path}: ", calibration__source=f"tokens:{path}")


def test_a_pickle_of_tokens_is_refused_and_not_run(refused, source, canary, tmp_path):
    torch.save(torch.zeros(2, 24), tmp_path / "ids.pt")
    refused(DataError, "ids.pt", calibration__source=f"tokens:{tmp_path}/ids.pt")
    path = source("ids.safetensors", pickle.dumps(Payload(canary)))
    refused(DataError, path, calibration__source=f"tokens:{path}")


@pytest.mark.parametrize("path", ["", "missing.safetensors", "~nobody-here/ids", ".", "x" * 300])
def test_a_token_file_that_is_none_is_refused(refused, path):
    refused(DataError, "file", calibration__source=f"tokens:{path}")


@pytest.mark.parametrize("path", ["missing.txt", "missing.jsonl", "~nobody-here/a.txt"])
def test_a_text_that_does_not_exist_is_refused(refused, path):
    refused(DataError, "no such file", calibration__source=path)


@pytest.mark.parametrize("name", ["text.csv", "text", "text.gz", "s3://bucket/text.txt", "Stdlib"])
def test_an_unknown_source_is_refused_with_those_there_are(refused, name):
    words = "stdlib, wikitext2" if "//" not in name else "text is read from local files only"
    refused(DataError, words, calibration__source=name)


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


FLIPPED = gzip.compress(b"a" * 99)[:-5] + b"\0" * 5  # another checksum and length
TEXTS = {
    "empty.txt": (b"", "contains no text"),
    "mark.txt": (b"\xef\xbb\xbf", "contains no text"),
    "short.txt": (b"few words", "one sequence needs"),
    "latin.txt": ("é".encode("latin-1") * 100, "is not UTF-8: invalid continuation byte at byte 0"),
    "late.txt": (b"x" * 1_500_000 + b"\xff", "is not UTF-8: invalid start byte at byte 1500000"),
    "cut.txt": (b"x" * 2**20 + b"\xe2\x82", "is not UTF-8: unexpected end of data at byte 1048576"),
    "empty.jsonl": (b"\n\n", "contains no text"),
    "broken.jsonl": (b'{"text": "a"}\n{"text"', "line 2: is not JSON"),
    "list.jsonl": (b'["text"]', "line 1: is a list, not an object"),
    "other.jsonl": (b'{"content": "a"}', "line 1: has no key 'text'; its keys: 'content'"),
    "number.jsonl": (b'{"text": 3}', "line 1: key 'text' is a number, not a string"),
    "null.jsonl": (b'{"text": null}', "line 1: key 'text' is null, not a string"),
    "nested.jsonl": (b'{"text":' * 100_000, "line 1: is not JSON"),
    "digits.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: is not JSON"),
    "latin.jsonl": (b'{"text": "\xe9"}', "line 1: is not UTF-8"),
    "keys.jsonl": (
        json.dumps(dict.fromkeys(map(str, range(100_000)))).encode(),
        "line 1: has no key 'text'; its keys: '0', '1'",
    ),
    "surrogate.jsonl": (b'{"text": "\\ud800 alone"}', "line 1: key 'text' is not valid text"),
    "half.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 9)[:-9],
        "cannot be decompressed as gzip",
    ),
    "flipped.txt.gz": (FLIPPED, "cannot be decompressed as gzip"),
    "half.txt.zst": (zstd(b"a" * 99)[:-1], "cannot be decompressed as zstd: Truncated"),
    "twice.txt.gz": (
        gzip.compress(gzip.compress(b"a")),
        "is compressed with gzip in gzip, which is not",
    ),
    "packed.parquet.gz": (
        gzip.compress(b"PAR1"),
        "is compressed with gzip, which is not supported",
    ),
    "xz.txt": (lzma.compress(b"a"), "is compressed with xz, which is not supported"),
    "parquet.txt": (b"PAR1\x15\x04", "is a parquet file"),
    "torn.txt": ("é".encode("utf-16") + b"a", "is not UTF-16LE: truncated data at byte 4"),
    "half.txt": (b"\xff\xfe\x00\xd8", "is not UTF-16LE: unexpected end of data at byte 2"),
    "text.parquet": (b"PAR1", "is not a readable parquet file"),
    "empty.parquet": (b"", "is not a readable parquet file"),
    "pickle.parquet": (pickle.dumps([1]), "is not a readable parquet file"),
    "terminal.jsonl": (b'{"\\u001b]0;owned\\u0007": 1}', r"its keys: '\x1b]0;owned\x07'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_wrong_text_is_refused(refused, source, name):
    data, words = TEXTS[name]
    path = source(name, data)
    refused(DataError, path, words, calibration__source=path)


def test_a_line_without_end_is_refused(refused, tmp_path):
    path = tmp_path / "line.jsonl"
    with path.open("wb") as file:
        file.truncate(2**40)
    refused(DataError, "line 1: is longer than", calibration__source=str(path))


@pytest.mark.parametrize("packing", ["gzip", "zstd"])
def test_a_line_without_end_is_refused_in_little_that_unpacks_to_much(refused, tmp_path, packing):
    path = tmp_path / "line.jsonl"
    with pa.CompressedOutputStream(str(path), packing) as file:
        for _ in range(66):
            file.write(b" " * 2**20)
    assert path.stat().st_size < 2**17
    refused(DataError, "line 1: is longer than", calibration__source=str(path))


def test_a_text_of_terabytes_is_read_no_further_than_needed(model, source, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_MIN_CHARACTERS", 1000)
    path = source("text.txt", sound_text() * 200)
    with Path(path).open("ab") as file:
        file.truncate(2**42)
    found = attempt(model, tmp_path / "run", calibration__source=path, calibration__sequences=4)
    assert found.calibration.shape == (4, 40)


@pytest.mark.parametrize("source", ["{}/text.txt", "tokens:{}/ids.safetensors"])
def test_a_file_that_may_not_be_read_is_refused(source):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("text.txt", "ids.safetensors"):
            Path(folder, name).touch(mode=0)
        for mode in (0o755, 0):  # first the file may not be read, then not even looked at
            Path(folder).chmod(mode)
            with as_nobody(), pytest.raises(DataError, match=r"ermission denied"):
                read_source(source.format(folder))


@contextlib.contextmanager
def as_nobody():
    """Be a user to whom files can be forbidden, where this one is root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def read_source(source):
    if source.startswith("tokens:"):
        tokens.prepare_tokens(
            source, split="calibration", tokenizer_uri="", vocab_size=9, sequence_length=None,
            num_sequences=None, bos=True, seed=0,
        )  # fmt: skip
    else:
        list(read_texts(source, split="calibration"))


def column(values, kind=None):
    return pa.table({"text": pa.array(values, kind)})


TABLES = {
    "no columns": (pa.table({}), "has no column 'text'; its columns: none"),
    "another column": (
        pa.table({"content": ["a"]}),
        "has no column 'text'; its columns: 'content'",
    ),
    "numbers": (column([1, 2]), "column 'text' is of type int64, not string"),
    "bytes": (column([b"a", b"\xe9"]), "row 2: is not UTF-8: unexpected end of data at byte 0"),
    "lists": (column([["a"]]), "column 'text' is of type list<element: string>, not string"),
    "objects": (column([{"a": 1}]), "column 'text' is of type struct"),
    "a null": (column(["a", None]), "row 2: text is null"),
    "no rows": (column([], pa.string()), "contains no text"),
    "empty rows": (column(["", ""]), "contains no text"),
    "two of them": (
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]),
        "has 2 column 'text'; its columns: 'text', 'text'",
    ),
    "not UTF-8": (
        column(pa.array([b"\xff\xfe" * 50]).cast(pa.binary()).view(pa.string())),
        "is not UTF-8",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_parquet_file_of_the_wrong_schema_is_refused(refused, tmp_path, case):
    table, words = TABLES[case]
    pq.write_table(table, tmp_path / "text.parquet")
    path = str(tmp_path / "text.parquet")
    refused(DataError, path, words, calibration__source=path)


def test_a_truncated_parquet_file_is_refused(refused, tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(column([sound_text()] * 4), path)
    path.write_bytes(path.read_bytes()[:-100])
    refused(DataError, "is not a readable parquet file", calibration__source=str(path))


def test_a_parquet_file_with_a_broken_page_is_refused(refused, tmp_path):
    path = tmp_path / "text.parquet"
    pq.write_table(column([sound_text()] * 4), path, compression="zstd")
    data = bytearray(path.read_bytes())
    data[8:60] = b"\xff" * 52
    path.write_bytes(data)
    refused(DataError, "is not a readable parquet file", calibration__source=str(path))


TOKENIZERS = {
    "missing": None,
    "empty": b"",
    "not JSON": b"{tokens}",
    "nothing in it": b"{}",
    "a list": b"[]",
    "nested": b"[" * 100_000,
    "unknown model": b'{"version": "1.0", "added_tokens": [], "model": {"type": "Magic"}}',
    "not text": b"\x80\x04\x95",
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_broken_tokenizer_is_refused_only_where_text_must_be_tokenised(
    refused, model, source, tmp_path, case
):
    (model / "tokenizer.json").unlink()
    if TOKENIZERS[case] is not None:
        (model / "tokenizer.json").write_bytes(TOKENIZERS[case])
    assert attempt(model, tmp_path / "run").plan.keep_fraction < 1
    path = source("text.txt", sound_text())
    refused(DataError, f"{model}: has no tokenizer that can be loaded", calibration__source=path)


TIKTOKEN = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))
# What is there in place of tokenizer.json, and what the refusal says.
INSTEAD = {
    "sentencepiece": (
        "tokenizer.model",
        b"\x0a\x0e\x0a\x05<unk>" * 20,
        "pip install sentencepiece",
    ),
    "tiktoken": ("tokenizer.model", TIKTOKEN, "pip install tiktoken"),
    "a template": (
        "chat_template.jinja",
        b"{{ messages }}",
        "none of tokenizer.json, tokenizer.model",
    ),
    "another's": ("vocab.json", b'{"a": 0}', "LlamaTokenizer finds no vocabulary in its files"),
}


@pytest.mark.parametrize("case", INSTEAD)
def test_a_tokenizer_that_cannot_be_read_is_refused_with_what_is_missing(
    refused, model, source, monkeypatch, case
):
    name, data, words = INSTEAD[case]
    if case in ("sentencepiece", "tiktoken"):  # in other cases transformers asks, and remembers it
        monkeypatch.setitem(sys.modules, case, None)  # as where it is not installed
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (model / name).write_bytes(data)
    text = source("text.txt", sound_text())
    said = refused(DataError, f"{model}: ", words, calibration__source=text)
    assert ("tiktoken" in said) == (case == "tiktoken")


def test_a_broken_sentencepiece_model_is_refused(refused, model, source):
    pytest.importorskip("sentencepiece", reason="an extra that is not installed")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (model / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\xff" * 20)
    refused(DataError, "no tokenizer", calibration__source=source("text.txt", sound_text()))


def test_a_tokenizer_of_gigabytes_is_refused(refused, model, source):
    with (model / "tokenizer.json").open("wb") as file:
        file.truncate(2**40)
    path = source("text.txt", sound_text())
    refused(DataError, "tokenizer.json", "too large for a tok", calibration__source=path)


def test_a_tokenizer_with_a_larger_vocabulary_than_the_model_is_refused(refused, model, source):
    path = model / "tokenizer.json"
    broken = json.loads(path.read_text())
    vocabulary = broken["model"]["vocab"]
    broken["model"]["vocab"] = {t: i if i < 4 else i + 600 for t, i in vocabulary.items()}
    path.write_text(json.dumps(broken))
    text = source("text.txt", sound_text())
    refused(DataError, "has token id", "model's ids are 0 to 511", calibration__source=text)


def test_code_that_comes_with_a_tokenizer_is_not_run(model, edit, source, canary, tmp_path):
    (model / "tokenization_evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    text = source("text.txt", sound_text())
    recipe = {"calibration__source": text, "calibration__sequences": 2}
    edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})
    assert attempt(model, tmp_path / "run", **recipe).calibration.shape == (2, 40)
    edit("config.json", auto_map={"AutoTokenizer": "tokenization_evil.Evil"})
    assert attempt(model, tmp_path / "run", **recipe).calibration.shape == (2, 40)


def test_a_chat_template_is_not_run(model, edit, source, canary, tmp_path):
    run = "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"
    edit("tokenizer_config.json", chat_template=run)
    text = source("text.txt", sound_text())
    found = attempt(model, tmp_path / "run", calibration__source=text, calibration__sequences=2)
    assert found.calibration.shape == (2, 40)


def test_embedded_tokens_for_a_broken_tokenizer_are_refused(refused, model):
    (model / "tokenizer.json").write_bytes(b"[")
    refused(DataError, "tokenizer.json: is not a tokenizer", calibration__source="embedded")


def test_a_long_text_gives_the_same_tokens_whole_and_in_pieces(source, model, monkeypatch):
    path = source("text.txt", sound_text())
    shutil.copy(path, path.replace("text.txt", "text.TXT"))
    arguments = {
        "split": "calibration", "tokenizer_uri": str(model), "vocab_size": 512,
        "sequence_length": 32, "num_sequences": 8, "bos": True, "seed": 0,
    }  # fmt: skip
    whole = tokens.prepare_tokens(path, **arguments)
    monkeypatch.setattr("actors.storage.characters._READ_BYTES", 1000)
    assert np.array_equal(whole, tokens.prepare_tokens(path, **arguments))
