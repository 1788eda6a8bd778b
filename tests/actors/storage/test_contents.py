"""The identity of a model is of every byte of it, and what spares a second reading never lies."""

import hashlib
import json
import os
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from actors.storage import checkpoint, contents
from actors.storage.checkpoint import Checkpoint
from actors.storage.contents import cache_folder, difference, remembered
from actors.storage.files import Directory
from planners.errors import ModelError
from tests.builders import save_model

UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("original"))


@pytest.fixture
def model(original, tmp_path):
    """Return a copy that may be changed."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep hashes in a folder of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compress-cluster" / "contents"


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), 8 + length


def flipped(path, at, *, bit=0):
    """Change one bit of a file in place, and nothing else about it that a program can set."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))
    os.utime(path, ns=times)


def tensor_at(path, at):
    header, begin = header_of(path)
    found = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    return next(k for k, (a, b) in found.items() if a <= at - begin < b)


def change(model, name):
    header, begin = header_of(model / WEIGHTS)
    flipped(model / WEIGHTS, begin + header[name]["data_offsets"][0] + 5)


@given(data=st.data())
def test_any_bit_of_any_tensor_that_is_another_makes_another_model(
    original, tmp_path_factory, data
):
    folder = shutil.copytree(original, tmp_path_factory.mktemp("flipped"), dirs_exist_ok=True)
    path = folder / WEIGHTS
    at = data.draw(st.integers(header_of(path)[1], path.stat().st_size - 1))
    flipped(path, at, bit=data.draw(st.integers(0, 7)))
    name = tensor_at(path, at)
    try:
        found = Checkpoint(str(folder)).contents
    except ModelError as error:  # the bit made it infinite
        assert name in str(error)  # noqa: PT017 most bits make a number
    else:
        assert difference(Checkpoint(str(original)).contents, found) == (
            f"tensor {name} of the model changed"
        )
    shutil.rmtree(folder)


def test_the_hash_of_a_tensor_is_of_its_dtype_shape_and_bytes(original):
    found = Checkpoint(str(original)).contents
    tensors = load_file(original / WEIGHTS)
    assert found.keys() == {"config.json", *tensors}
    for name, tensor in tensors.items():
        begin = json.dumps(["F32", list(tensor.shape)]).encode()
        assert found[name] == hashlib.sha256(begin + tensor.numpy().tobytes()).hexdigest()


def test_files_and_blocks_make_no_difference_to_the_identity(original, tmp_path, monkeypatch):
    several = save_model(tmp_path / "several", max_shard_size="30KB")
    assert len(list(several.glob("*.safetensors"))) > 2
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 300)
    assert Checkpoint(str(several)).revision == Checkpoint(str(original)).revision


def test_another_word_of_the_config_makes_another_model_but_not_another_order(model):
    before = Checkpoint(str(model)).contents
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert Checkpoint(str(model)).contents == before
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert difference(before, Checkpoint(str(model)).contents) == "config.json of the model changed"


def test_who_knows_what_to_expect_refuses_a_changed_tensor_and_reads_the_others(model):
    expected = Checkpoint(str(model)).contents
    change(model, UP)
    found = Checkpoint(str(model), expected)
    found.read_layer(0)
    assert len(list(found.read_blocks("lm_head.weight", rows=7))) == 9
    with pytest.raises(
        ModelError, match=rf"model\.safetensors: tensor {UP} changed since this run started"
    ):
        found.read_layer(1)
    with pytest.raises(ModelError, match=UP):
        list(found.read_blocks(UP, rows=7))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(ModelError, match=r"config\.json changed since this run started"):
        Checkpoint(str(model), expected)


class Reader:
    """Reads a model of any size as a large one is read, and counts how often a file is hashed."""

    def __init__(self, uri):
        self.uri, self.count = str(uri), 0

    def contents(self):
        found = Checkpoint(self.uri)
        file = WEIGHTS

        def hashed():
            self.count += 1
            return found._hashes(found.locations)

        return remembered(found.directory, file, found.locations, hashed)


@pytest.fixture
def settled(monkeypatch):
    """Take a file as settled a tenth of a second after its last change, and wait that long."""
    monkeypatch.setattr(contents, "SETTLED_SECONDS", 0.1)
    return lambda: time.sleep(0.15)


def rewritten(model):
    change(model, UP)


def replaced(model):
    """Put another file there, of the same size and times."""
    new = model / "new"
    shutil.copy2(model / WEIGHTS, new)
    times = new.stat().st_atime_ns, new.stat().st_mtime_ns
    data = bytearray(new.read_bytes())
    data[-1] ^= 1
    new.write_bytes(data)
    os.utime(new, ns=times)
    new.replace(model / WEIGHTS)


@pytest.mark.parametrize("way", [rewritten, replaced])
def test_a_file_that_nothing_touched_is_read_once_and_one_with_the_old_times_again(
    model, settled, way
):
    settled()
    reader = Reader(model)
    before = reader.contents()
    assert reader.contents() == before
    assert reader.count == 1
    old = (model / WEIGHTS).stat()
    way(model)
    new = (model / WEIGHTS).stat()
    assert (new.st_size, new.st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert reader.contents() != before
    assert reader.count == 2


def test_a_file_that_changed_just_now_is_not_kept(model):
    reader = Reader(model)
    reader.contents()
    reader.contents()
    assert reader.count == 2


def test_a_file_that_changes_while_it_is_read_is_not_kept(model, settled, cache):
    settled()
    found = Checkpoint(str(model))

    def hashed():
        change(model, UP)
        return found._hashes(found.locations)

    remembered(found.directory, WEIGHTS, found.locations, hashed)
    assert not cache.exists()


def torn(place):
    place.write_bytes(place.read_bytes()[:-40])


def forged(place):
    place.write_text(place.read_text().replace('"tensors": {', '"tensors": {"more": "0",'))


@pytest.mark.parametrize("fault", [torn, forged, lambda place: place.write_bytes(b"")])
def test_what_was_kept_and_is_torn_is_not_used(model, settled, cache, fault):
    settled()
    reader = Reader(model)
    before = reader.contents()
    (place,) = cache.iterdir()
    fault(place)
    assert reader.contents() == before
    assert reader.count == 2
    assert reader.contents() == before
    assert reader.count == 2


def test_a_cache_that_cannot_be_written_costs_a_reading_and_nothing_else(
    model, settled, monkeypatch
):
    settled()
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / WEIGHTS))  # a file, so no folder in it
    reader = Reader(model)
    assert reader.contents() == reader.contents() == Reader(model).contents()


def test_many_at_one_time_keep_the_same(model, settled, cache):
    settled()
    readers = [Reader(model) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda reader: reader.contents(), readers))
    assert all(each == found[0] for each in found)
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    late = Reader(model)
    assert late.contents() == found[0]
    assert late.count == 0


def test_a_large_model_is_read_once_and_a_small_one_each_time(model, settled, cache, monkeypatch):
    settled()
    small = Checkpoint(str(model)).revision
    assert not cache.exists()
    monkeypatch.setattr(checkpoint, "SMALL_BYTES", 0)
    assert Checkpoint(str(model)).revision == small
    monkeypatch.setattr(Checkpoint, "_hashes", lambda *_: pytest.fail("it is read again"))
    assert Checkpoint(str(model)).revision == small


def test_an_object_is_read_once_for_each_tag_that_its_store_gives_it(model, s3):
    uri = s3("model")
    store = Directory(uri)
    for path in model.iterdir():
        if path.is_file():
            store.write(path.name, path.read_bytes())
    reader = Reader(uri)
    before = reader.contents()
    assert reader.contents() == before
    assert reader.count == 1
    change(model, UP)  # an object of the same size, in the same second as likely as not
    store.write(WEIGHTS, (model / WEIGHTS).read_bytes())
    after = reader.contents()
    assert difference(before, after) == f"tensor {UP} of the model changed"
    assert reader.contents() == after
    assert reader.count == 2


def test_a_blob_of_the_hubs_cache_that_is_edited_in_place_is_seen_through_its_link(
    model, tmp_path, settled
):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    shutil.copytree(model, snapshot)
    blobs.mkdir()
    blob = blobs / hashlib.sha256((snapshot / WEIGHTS).read_bytes()).hexdigest()
    (snapshot / WEIGHTS).rename(blob)
    (snapshot / WEIGHTS).symlink_to(f"../../blobs/{blob.name}")
    settled()
    reader = Reader(snapshot)
    before = reader.contents()
    assert reader.contents() == before
    assert reader.count == 1
    change(snapshot, UP)
    assert difference(before, reader.contents()) == f"tensor {UP} of the model changed"


def test_the_cache_is_in_the_home_unless_said_otherwise(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "compress-cluster"
