"""The sources of text: what they yield, in which order, and what they refuse."""

import json
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from actors.storage.texts import SPLITS, read_texts
from planners.errors import DataError
from tests.hub import FakeHub, used_in_process, wikitext_file


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small folder that stands for the standard library; returns a function that adds a file."""
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)

    def add(name, data=None):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() if data is None else data)

    return add


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(source, split="calibration"):
    return list(read_texts(str(source), split=split))


def refusal(source, split="calibration"):
    """Return message and hint of the refusal of ``source``."""
    with pytest.raises(DataError) as caught:
        read(source, split)
    return f"{caught.value}; {caught.value.hint}"


def test_stdlib_splits_share_no_file_and_together_hold_every_file(library):
    names = [f"package/module_{number}.py" for number in range(200)]
    for name in names:
        library(name)
    texts = {split: read("stdlib", split) for split in SPLITS}
    assert sorted(text for split in SPLITS for text in texts[split]) == sorted(names)
    assert len(texts["train"]) > len(texts["calibration"]) > len(texts["evaluation"]) > 0


def test_stdlib_file_stays_in_its_split_when_other_files_come_and_go(library):
    for number in range(0, 100, 2):
        library(f"module_{number}.py")
    before = {split: set(read("stdlib", split)) for split in SPLITS}
    for number in range(1, 100, 2):
        library(f"module_{number}.py")
    assert all(before[split] <= set(read("stdlib", split)) for split in SPLITS)


def test_stdlib_texts_come_in_the_order_of_their_paths(library):
    for number in range(100):
        library(f"module_{number:02}.py")
    texts = read("stdlib", "train")
    assert texts == sorted(texts)


def test_stdlib_leaves_out_tests_installed_packages_and_build_descriptions(library):
    left_out = [
        "test/support.py",
        "lib2to3/tests/data.py",
        "idlelib/idle_test/mock.py",
        "site-packages/numpy.py",
        "dist-packages/numpy.py",
        "package/__pycache__/module.py",
        "_sysconfigdata__linux.py",
        "config-3.11-linux/python-config.py",
    ]
    kept = [f"testing/latest_{number}.py" for number in range(50)]
    for name in left_out + kept:
        library(name)
    assert {text for split in SPLITS for text in read("stdlib", split)} == set(kept)


def test_stdlib_skips_files_that_are_not_utf8(library):
    for number in range(50):
        library(f"module_{number}.py")
        library(f"latin/module_{number}.py", data=b"# -*- coding: latin-1 -*- \xe9")
    texts = [text for split in SPLITS for text in read("stdlib", split)]
    assert len(texts) == 50


def test_stdlib_of_this_interpreter_has_text_for_every_split():
    for split in SPLITS:
        assert "import" in next(read_texts("stdlib", split=split))


def test_txt_file_is_one_text_unchanged(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("first\r\n\n  second ☃\n".encode())
    assert read(path) == ["first\r\n\n  second ☃\n"]


def test_byte_order_mark_is_not_part_of_the_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbftext")
    assert read(path) == ["text"]


def test_jsonl_yields_the_text_of_each_line_in_order(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "ä\nb"}, {"id": 1, "text": "c"}])
    assert read(source) == ["ä\nb", "c"]


def test_jsonl_blank_lines_and_empty_texts_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": ""}\n{"text": "a"}\n\n')
    assert read(path) == ["a"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(),
        pa.binary_view(), pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int32(), pa.large_string()),
    ],
    ids=str,
)  # fmt: skip
def test_parquet_yields_the_text_column_in_order_whatever_keeps_its_strings(tmp_path, kind):
    texts = ["é", "", "b", "é"] * 300
    table = pa.table({"id": range(1200), "text": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert read(tmp_path / "a.parquet") == [text for text in texts if text]


def test_a_local_file_is_the_same_for_every_split(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    assert all(read(source, split) == ["a", "b"] for split in SPLITS)


def test_the_ending_of_a_file_is_read_in_any_case(tmp_path):
    path = tmp_path / "A.TXT"
    path.write_text("text")
    assert read(path) == ["text"]


def test_unknown_source_is_refused_with_the_possible_ones():
    message = refusal("c4")
    for part in ("'c4'", "stdlib", "wikitext2", ".txt", ".jsonl", ".parquet"):
        assert part in message


def test_unknown_split_is_refused_with_the_possible_ones():
    message = refusal("stdlib", "validation")
    for part in ("'validation'", *SPLITS):
        assert part in message


def test_sources_are_refused_at_the_call_and_not_when_first_iterated(tmp_path):
    with pytest.raises(DataError):
        read_texts(str(tmp_path / "missing.jsonl"), split="train")
    with pytest.raises(DataError):
        read_texts(write_rows(tmp_path / "a.jsonl", [{"txt": "a"}]), split="train")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_missing_file_is_refused_by_name(tmp_path, name):
    assert f"{tmp_path / name}: no such file" in refusal(tmp_path / name)


def test_directory_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.mkdir()
    assert "is not a file" in refusal(path)


def test_txt_that_is_not_utf8_is_refused_with_the_place(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 au lait")
    message = refusal(path)
    assert str(path) in message
    assert "not UTF-8" in message
    assert "at byte 3" in message


def test_jsonl_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    message = refusal(path)
    assert f"{path}, line 2" in message
    assert "not UTF-8" in message


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"text": ', "is not JSON"),
        ('["text"]', "is a list, not an object"),
        ('{"body": "a", "id": 1}', "has no key 'text'; its keys: 'body', 'id'"),
        ('{"text": 3}', "key 'text' is a number, not a string"),
        ('{"text": null}', "key 'text' is null, not a string"),
    ],
)
def test_bad_jsonl_line_is_refused_with_its_number(tmp_path, line, complaint):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n\n{line}\n')
    message = refusal(path)
    assert f"{path}, line 3: {complaint}" in message
    assert '{"text": "..."}' in message


def test_parquet_without_a_text_column_is_refused_with_the_columns_it_has(tmp_path):
    message = refusal(write_table(tmp_path / "a.parquet", body=["a"], id=[1]))
    assert "a.parquet: has no column 'text'; its columns: 'body', 'id'" in message


def test_parquet_whose_text_is_not_strings_is_refused_with_its_type(tmp_path):
    message = refusal(write_table(tmp_path / "a.parquet", text=[1, 2]))
    assert "column 'text' is of type int64, not string" in message


def test_parquet_null_is_refused_with_its_row(tmp_path):
    message = refusal(write_table(tmp_path / "a.parquet", text=["a", "b", None]))
    assert "a.parquet, row 3: text is null" in message


@pytest.mark.parametrize("data", [b"", b"not parquet", b"PAR1" + bytes(20) + b"PAR1"])
def test_damaged_parquet_is_refused(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    message = refusal(path)
    assert f"{path}: is not a readable parquet file" in message


def test_cut_off_parquet_is_refused(tmp_path):
    path = Path(write_table(tmp_path / "a.parquet", text=["a" * 1000]))
    path.write_bytes(path.read_bytes()[:-20])
    assert "is not a readable parquet file" in refusal(path)


def test_source_without_text_is_refused(tmp_path):
    empty = tmp_path / "a.txt"
    empty.write_text("")
    for source in (
        empty,
        write_rows(tmp_path / "a.jsonl", []),
        write_rows(tmp_path / "b.jsonl", [{"text": ""}]),
        write_table(tmp_path / "a.parquet", text=pa.array([], pa.string())),
    ):
        assert f"{source}: contains no text" in refusal(source)


@pytest.fixture
def wikitext(tmp_path, monkeypatch):
    """A Hub that has WikiText-2, as this process sees it."""
    (tmp_path / "empty").mkdir()
    with FakeHub(tmp_path / "empty") as hub:
        used_in_process(hub, monkeypatch, tmp_path)
        for split in ("train", "test"):
            hub.wikitext[split] = wikitext_file(["", f" = {split} = \n", " text \n"])
        yield hub


@pytest.mark.usefixtures("wikitext")
@pytest.mark.parametrize(
    ("split", "split_of_wikitext"),
    [("train", "train"), ("calibration", "train"), ("evaluation", "test")],
)
def test_wikitext2_rows_are_joined_by_blank_lines(monkeypatch, split, split_of_wikitext):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as on a node, which has the wheel alone
    assert read("wikitext2", split) == [f"\n\n = {split_of_wikitext} = \n\n\n text \n"]


def test_wikitext2_without_the_hub_is_refused_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("wikitext2")
    assert "cannot be downloaded from the Hugging Face Hub" in message
    assert "local .txt, .jsonl or .parquet file" in message
