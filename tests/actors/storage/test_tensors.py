"""Our safetensors files and those of the safetensors library are the same files."""

import hashlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from actors.storage.files import Directory
from actors.storage.tensors import (
    TORCH_DTYPE,
    described,
    read_header,
    read_tensor,
    read_tensors,
    tensor_bytes,
    write_rows,
    write_tensors,
    write_weights,
)
from planners.errors import ModelError


@st.composite
def tensors(draw):
    """Draw any bytes as a tensor: NaNs with a payload and negative zeros among them."""
    dtype = draw(st.sampled_from(list(TORCH_DTYPE.values())))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    num_bytes = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=num_bytes, max_size=num_bytes))
    if dtype == torch.bool:
        data = bytes(byte % 2 for byte in data)
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()
    return flat.view(dtype).reshape(shape)


FILES = st.dictionaries(st.text("abc.xyz", min_size=1, max_size=6), tensors(), max_size=5)


def bits(tensors):
    return {n: (t.dtype, tuple(t.shape), bytes(tensor_bytes(t))) for n, t in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensors")


@given(FILES)
def test_the_library_reads_what_we_write_bit_for_bit(folder, found):
    entry = write_tensors(Directory(str(folder)), "ours.safetensors", found)
    assert bits(load_file(folder / "ours.safetensors")) == bits(found)
    data = (folder / "ours.safetensors").read_bytes()
    assert (entry.bytes, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())


@given(FILES)
def test_we_read_what_the_library_writes_bit_for_bit(folder, found):
    save_file(found, folder / "theirs.safetensors", metadata={"format": "pt"})
    assert bits(read_tensors(Directory(str(folder)), "theirs.safetensors")) == bits(found)


@given(FILES)
def test_the_order_of_tensors_does_not_change_the_file(folder, found):
    directory = Directory(str(folder))
    one = write_tensors(directory, "one.safetensors", found)
    other = write_tensors(directory, "two.safetensors", dict(reversed(found.items())))
    assert one.sha256 == other.sha256


def test_weights_are_hashed_while_they_are_written(folder):
    found = {"small": torch.ones(3, 2), "large": torch.arange(2**21), "none": torch.empty(0, 4)}
    directory = Directory(str(folder))
    entry, facts = write_weights(directory, "weights.safetensors", found)
    again = write_tensors(directory, "again.safetensors", found, metadata={"format": "pt"})
    assert (entry.bytes, entry.sha256) == (again.bytes, again.sha256)
    assert facts == {name: described(tensor) for name, tensor in found.items()}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from(list(TORCH_DTYPE)))
def test_a_matrix_that_arrives_in_blocks_is_the_file_of_the_whole(folder, sizes, name):
    whole = torch.arange(sum(sizes) * 3).reshape(-1, 3).to(TORCH_DTYPE[name])
    directory = Directory(str(folder))
    shape = tuple(whole.shape)
    rows = whole.split(sizes)
    blocks, facts = write_rows(directory, "rows.safetensors", "table", rows, shape=shape)
    at_once = write_tensors(directory, "w.safetensors", {"table": whole}, metadata={"format": "pt"})
    assert blocks.sha256 == at_once.sha256
    assert facts == described(whole)


@given(tensors().filter(lambda tensor: tensor.dim() > 0), st.data())
def test_rows_are_read_alone(folder, tensor, data):
    directory = Directory(str(folder))
    write_tensors(directory, "table.safetensors", {"table": tensor})
    first = data.draw(st.integers(0, len(tensor)))
    last = data.draw(st.integers(first, len(tensor)))
    entry = read_header(directory, "table.safetensors")["table"]
    rows = read_tensor(directory, "table.safetensors", entry, rows=(first, last))
    assert bits({"": rows}) == bits({"": tensor[first:last]})


def test_metadata_is_kept(folder):
    write_tensors(
        Directory(str(folder)), "m.safetensors", {"x": torch.ones(2)}, metadata={"format": "pt"}
    )
    with safe_open(folder / "m.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_was_read_may_be_changed(folder):
    directory = Directory(str(folder))
    write_tensors(directory, "own.safetensors", {"x": torch.ones(3)})
    read_tensors(directory, "own.safetensors")["x"].add_(1)
    assert torch.equal(read_tensors(directory, "own.safetensors")["x"], torch.ones(3))


def with_header(folder, change):
    """Write a sound file of two tensors, then change its header, or put a text in its place."""
    write_tensors(
        Directory(str(folder)), "bad.safetensors", {"a": torch.ones(4), "b": torch.zeros(4)}
    )
    data = (folder / "bad.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = (
        change if isinstance(change, str) else json.dumps(change(json.loads(data[8 : 8 + length])))
    )
    header = text.encode()
    (folder / "bad.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data[8 + length :]
    )


def moved(header, **entry):
    return header | {"b": header["b"] | entry}


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[" * 100_000,
        '{"a": 1, "a": 2}',
        lambda header: [header],
        lambda header: moved(header, data_offsets=[0, 16]),
        lambda header: moved(header, data_offsets=[20, 36]),
        lambda header: moved(header, data_offsets=[16, 8]),
        lambda header: moved(header, data_offsets=[-16, 0]),
        lambda header: moved(header, shape=[5]),
        lambda header: moved(header, shape=[2**40, 2**40]),
        lambda header: moved(header, shape=[True]),
        lambda header: moved(header, dtype="F5"),
        lambda header: header | {"c": {"dtype": "F32", "shape": [1], "data_offsets": [32, 36]}},
        lambda header: {"a": header["a"]},
    ],
)
def test_a_header_that_lies_is_refused_with_the_name_of_the_file(folder, change):
    with_header(folder, change)
    with pytest.raises(ModelError, match=r"bad\.safetensors"):
        read_header(Directory(str(folder)), "bad.safetensors")


@given(st.binary(max_size=64))
def test_a_file_of_anything_else_is_refused(folder, data):
    (folder / "noise.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match=r"noise\.safetensors"):
        read_header(Directory(str(folder)), "noise.safetensors")


@given(st.integers(0, 100))
def test_a_truncated_file_is_refused(folder, num_bytes):
    write_tensors(Directory(str(folder)), "cut.safetensors", {"a": torch.ones(50)})
    data = (folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) * num_bytes // 101])
    with pytest.raises(ModelError, match=r"cut\.safetensors"):
        read_header(Directory(str(folder)), "cut.safetensors")
