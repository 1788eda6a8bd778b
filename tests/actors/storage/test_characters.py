"""Texts are the same however they are packed and encoded; advice that is given works."""

import bz2
import codecs
import gzip
import json
import shutil
import subprocess

import pyarrow as pa
import pytest

from actors.storage.characters import NotDecodedError, characters
from actors.storage.texts import read_texts
from planners.errors import DataError

TEXT = "Once upon a timé ☃ there was 🐶 a dog\n" * 50
PLAIN = "Once upon a time there was a little dog\n" * 50
MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def framed(name, data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, name) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: framed("zstd", data),
    ".lz4": lambda data: framed("lz4", data),
}


def read(path):
    return list(read_texts(str(path), split="calibration"))


def refusal(path):
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value), caught.value.hint


@pytest.mark.parametrize("ending", PACKINGS)
@pytest.mark.parametrize("encoding", MARKS)
def test_a_text_is_the_same_however_it_is_packed_and_encoded(tmp_path, encoding, ending):
    def write(name, text):
        path = tmp_path / (name + ending)
        path.write_bytes(PACKINGS[ending](MARKS[encoding] + text.encode(encoding)))
        return path

    assert read(write("a.txt", TEXT)) == [TEXT]
    lines = [json.dumps({"text": line}, ensure_ascii=False) for line in TEXT.splitlines()]
    for newline in ("\n", "\r\n"):
        assert read(write("a.jsonl", newline.join(lines))) == TEXT.splitlines()


@pytest.mark.parametrize("ending", PACKINGS)
def test_what_packed_a_file_is_told_by_its_bytes_and_not_by_its_name(tmp_path, ending):
    for name in ("a.txt", "a.txt.gz"):
        (tmp_path / name).write_bytes(PACKINGS[ending](TEXT.encode()))
        assert read(tmp_path / name) == [TEXT]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, PACKINGS[".zst"]])
def test_files_that_were_packed_and_joined_are_read_to_the_end(tmp_path, pack):
    path = tmp_path / "a.txt"
    data = TEXT.encode()
    path.write_bytes(b"".join(pack(data[i : i + 100]) for i in range(0, len(data), 100)))
    assert read(path) == [TEXT]


def test_a_frame_before_the_first_that_is_to_be_skipped_is_skipped(tmp_path):
    path = tmp_path / "a.txt.zst"  # as the parallel zstd writes
    path.write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0size" + framed("zstd", TEXT.encode()))
    assert read(path) == [TEXT]


@pytest.mark.parametrize("ending", PACKINGS)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_a_text_does_not_depend_on_the_pieces_it_is_read_in(tmp_path, monkeypatch, size, ending):
    monkeypatch.setattr("actors.storage.characters._READ_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes(PACKINGS[ending](TEXT.encode("utf-16")))
    assert "".join(characters(path)) == TEXT


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_byte_that_is_wrong_is_named_by_its_place_in_the_file(tmp_path, monkeypatch, mark, size):
    monkeypatch.setattr("actors.storage.characters._READ_BYTES", size)
    path = tmp_path / "a.txt"
    path.write_bytes(mark + "äbc".encode() + b"\xff" + b"def")
    found = []
    with pytest.raises(NotDecodedError, match=f"at byte {len(mark) + 4}$"):
        found.extend(characters(path))
    # What stands before it has been given.
    assert not found or "".join(found) in "äbc"


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("encoding", "text", "expected"),
    [
        ("latin-1", "Once upon a timé there\n" * 9, "Once upon a timé there\n" * 9),
        ("utf-16-le", PLAIN, PLAIN),
        ("utf-16-be", PLAIN, PLAIN),
        ("utf-32-le", PLAIN, PLAIN),
        ("utf-32-be", PLAIN, PLAIN),
    ],
)
def test_the_advice_on_an_encoding_gives_the_text(tmp_path, ending, encoding, text, expected):
    path = tmp_path / f"a text's.txt{ending}"
    path.write_bytes(PACKINGS[ending](text.encode(encoding)))
    message, hint = refusal(path)
    assert "is not UTF-8" in message
    assert follow(hint, tmp_path / "utf8-a text's.txt") == expected


@pytest.mark.parametrize("data", [b"caf\xc3\xa9 \xff au lait", b"caf\xc3\xa9  au lait\xc3"])
def test_the_advice_on_a_byte_that_is_damaged_gives_the_text_without_it(tmp_path, data):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    _, hint = refusal(path)
    assert follow(hint, tmp_path / "utf8-a.txt") == "café  au lait"


def test_the_advice_on_what_is_not_unpacked_here_gives_the_text(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(gzip.compress(TEXT.encode())))
    message, hint = refusal(path)
    assert "gzip in gzip" in message
    assert follow(hint, tmp_path / "unpacked-a.txt") == TEXT


def follow(hint, path):
    """Type what stands between the ticks of a hint, and read what came of it."""
    command = hint.split("`")[1]
    for program in ("iconv", "gzip"):
        if program in command and not shutil.which(program):
            pytest.skip(f"needs {program}")
    subprocess.run(command, shell=True, check=False, capture_output=True)
    return "".join(read(path))


def test_a_few_nul_bytes_are_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\0b" * 100)
    assert read(path) == ["a\0b" * 100]


def test_a_bad_line_is_named_behind_those_that_are_good(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 3000 + b'{"text": "caf\xe9"}\n'))
    message, _ = refusal(path)
    assert f"{path}, line 3001: is not UTF-8" in message
    assert message.endswith(f"at byte {14 * 3000 + 13}")
