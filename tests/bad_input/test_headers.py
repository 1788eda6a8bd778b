"""Safetensors headers of strangers: each is refused for what is wrong with it."""

import json
import pickle

import pytest

from actors.storage.headers import MAX_HEADER_BYTES
from planners.errors import ModelError

PAIR = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
}
DATA = bytes(12)
MEGABYTE = 2**20


def file_of(header, data=DATA, *, length=None):
    """Return the bytes of a file with this header: JSON, text or bytes as they are."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    text = header if isinstance(header, bytes) else header.encode()
    length = len(text) if length is None else length
    return length.to_bytes(8, "little") + text + data


def entry(**changes):
    """Return a file whose first tensor differs from a sound one in some keys."""
    return file_of({**PAIR, "a": {**PAIR["a"], **changes}})


def named(name):
    return file_of({**PAIR, name: {**PAIR["a"], "shape": [3]}})


CASES = {
    "empty file": (b"", "0 bytes are too short"),
    "only half a length": (b"\x08\0\0\0", "4 bytes are too short"),
    "length of exabytes": (file_of(PAIR, length=2**63 + 7), "its header claims 92233720"),
    "length beyond the file": (file_of(PAIR, length=5000), "claims 5000 bytes, the file has"),
    "length zero": (file_of("", DATA), "not valid JSON"),
    "length into the data": (file_of(PAIR, length=len(json.dumps(PAIR)) + 4), "not valid JSON"),
    "length cuts the header": (file_of(PAIR, length=20), "not valid JSON"),
    "not JSON": (file_of("{tensors}"), "not valid JSON"),
    "array": (file_of("[]"), "not a JSON object"),
    "null": (file_of("null"), "not a JSON object"),
    "number of 5,000 digits": (file_of('{"a": ' + "9" * 5000 + "}"), "not valid JSON"),
    "space before the object": (file_of(" " + json.dumps(PAIR)), "not a JSON object"),
    "UTF-16": (file_of(json.dumps(PAIR).encode("utf-16")), "not valid JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "nested 100,000 deep": (file_of('{"a":' * 100_000), "not valid JSON"),
    "name twice": (
        file_of(f'{{"a": {json.dumps(PAIR["a"])}, "a": {json.dumps(PAIR["a"])}}}'),
        "a key occurs twice",
    ),
    "key of a tensor twice": (
        file_of('{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'),
        "a key occurs twice",
    ),
    "tensor is a number": (file_of({"a": 1}), "'a': must have exactly dtype, shape and"),
    "tensor without dtype": (
        file_of({"a": {"shape": [2], "data_offsets": [0, 8]}}),
        "'a': must have exactly dtype, shape and data_offsets",
    ),
    "tensor with a further key": (
        entry(compressed=True),
        "'a': must have exactly dtype, shape and",
    ),
    "dtype unknown": (entry(dtype="F8_E5M2"), "dtype 'F8_E5M2' is not supported; supported: F64"),
    "dtype a number": (entry(dtype=4), "dtype 4 is not supported"),
    "dtype a list": (entry(dtype=["F32"]), "dtype ['F32'] is not supported"),
    "dtype an object": (entry(dtype={}), "dtype {} is not supported"),
    "shape a number": (entry(shape=2), "shape 2 is not a list"),
    "shape negative": (entry(shape=[-2]), "shape [-2] is not a list"),
    "shape twice negative": (entry(shape=[-2, -1]), "shape [-2, -1] is not a list"),
    "shape boolean": (entry(shape=[2, True]), "shape [2, True] is not a list"),
    "shape fractional": (entry(shape=[2.0]), "shape [2.0] is not a list"),
    "shape not a number": (entry(shape=[float("nan")]), "shape [nan] is not a list"),
    "shape text": (entry(shape=["2"]), "shape ['2'] is not a list"),
    "shape nested": (entry(shape=[[2]]), "shape [[2]] is not a list"),
    "shape huge": (entry(shape=[2**70]), "shape [1180591620717411303424] is not a list"),
    "shape whose product wraps to its bytes": (entry(shape=[2**32, 2**32, 2]), "is not a list"),
    "shape huge but for a zero": (
        entry(shape=[2**61, 2**61, 0], data_offsets=[0, 0]),
        "is not a list",
    ),
    "shape of 9 dims": (entry(shape=[2] + 8 * [1]), "not a list of at most 8"),
    "shape of 100,000 dims": (entry(shape=[1] * 100_000), "not a list of at most 8"),
    "offsets reversed": (entry(data_offsets=[8, 0]), "data_offsets [8, 0] are not [begin, end]"),
    "offsets negative": (entry(data_offsets=[-8, 0]), "data_offsets [-8, 0] are not"),
    "offsets of three": (entry(data_offsets=[0, 4, 8]), "data_offsets [0, 4, 8] are not"),
    "offsets text": (entry(data_offsets=["0", "8"]), "data_offsets ['0', '8'] are not"),
    "offsets null": (entry(data_offsets=None), "data_offsets None are not"),
    "offsets huge": (entry(data_offsets=[2**80, 2**80 + 8]), "are not [begin, end]"),
    "size of another shape": (entry(shape=[3]), "shape [3] of F32 needs 12 bytes, data_offsets"),
    "size of another dtype": (entry(dtype="F64"), "of F64 needs 16 bytes, data_offsets give 8"),
    "tensors overlap": (
        file_of({**PAIR, "b": {**PAIR["b"], "data_offsets": [4, 8]}}),
        "'b' begins at byte",
    ),
    "tensors the same": (file_of({"a": PAIR["a"], "b": PAIR["a"]}, bytes(8)), "overlap or leave"),
    "hole between tensors": (
        file_of({**PAIR, "b": {**PAIR["b"], "data_offsets": [16, 20]}}, bytes(20)),
        "tensors overlap or leave a gap",
    ),
    "hole before the first": (file_of({"b": PAIR["b"]}), "tensors overlap or leave a gap"),
    "bytes after the last": (file_of(PAIR, DATA + b"more"), "truncated or padded"),
    "no tensors but bytes": (file_of({}), "truncated or padded"),
    "truncated by a byte": (file_of(PAIR, DATA[:-1]), "truncated or padded"),
    "truncated to the header": (file_of(PAIR, b""), "truncated or padded"),
    "metadata a text": (file_of({"__metadata__": "pt", **PAIR}), "__metadata__"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}, **PAIR}), "__metadata__"),
    "name for a terminal": (named("\x1b]0;owned\x07\n\r"), r"'\x1b]0;owned\x07\n\r'"),
    "name of a megabyte": (named("n" * MEGABYTE), "nnn"),
    "no tensors at all": (file_of({}, b""), "tensor model.embed_tokens.weight is missing"),
    "tensors of another model": (file_of(PAIR), "tensor model.embed_tokens.weight is missing"),
    "header of nothing but objects": (
        file_of("{" + ",".join(f'"{i}":{{}}' for i in range(300_000)) + "}"),
        "must have exactly dtype",
    ),
    "header of nothing but lists": (
        file_of('{"a":[' + "[]," * (MAX_HEADER_BYTES // 3 - 10) + "[]]}"),
        "must have exactly dtype",
    ),
    "header over the limit": (
        file_of('{"a":' + " " * MAX_HEADER_BYTES + "{}}"),
        f"its header has {MAX_HEADER_BYTES + 8} bytes, over the limit of {MAX_HEADER_BYTES}",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_broken_header_is_refused_for_what_is_wrong(refused, model, case):
    data, words = CASES[case]
    (model / "model.safetensors").write_bytes(data)
    refused(ModelError, str(model), words)


def test_a_file_of_terabytes_without_contents_is_refused(refused, model):
    header = {"a": {"dtype": "U8", "shape": [2**43], "data_offsets": [0, 2**43]}}
    data = file_of(header, b"")
    with (model / "model.safetensors").open("wb") as file:
        file.write(data)
        file.truncate(len(data) + 2**43)
    refused(ModelError, "tensor model.embed_tokens.weight is missing")


class Payload:
    """Pickles as an instruction to create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary"))).close()
    assert (tmp_path / "canary").exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused_and_not_run(refused, model, canary):
    (model / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    refused(ModelError, "not a safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_a_model_of_pickles_alone_is_refused_and_not_run(refused, model, canary, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Payload(canary)))
    refused(ModelError, f"only pickle weights ({name})", "safe_serialization=True")
