"""Whatever encoding a terminal, a log or a name has, there is no traceback."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest

from actors.storage.files import Directory
from orchestrator.cli.main import main
from orchestrator.cli.output import Console, streams
from planners.errors import StorageError
from tests.bad_input.refusals import attempt


@pytest.fixture
def printed(monkeypatch):
    """Return a function that gives stdout and stderr an encoding, and one that reads stdout."""

    def call(encoding):
        kept = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", kept[0])
        monkeypatch.setattr(sys, "stderr", kept[1])
        return lambda: kept[0].buffer.getvalue().decode(encoding)

    return call


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "8 x 2 - 10~ \\xe9t\\xe9 \\xe9 # 2 ? _.-=+*%#"),
        ("latin-1", "8 \xd7 2 \xb7 10~ \xe9t\xe9 \\xe9 # \xb2 ? _.-=+*%#"),
        ("utf-8", "8 \xd7 2 \xb7 10… \xe9t\xe9 \\xe9 █ \xb2 \u2603 ▁▂▃▄▅▆▇█"),
    ],
)
def test_what_an_encoding_does_not_have_is_printed_as_what_looks_like_it(
    printed, encoding, expected
):
    said = printed(encoding)
    with streams():
        Console().print("8 \xd7 2 \xb7 10… \xe9t\xe9 \udce9 █ \xb2 \u2603 ▁▂▃▄▅▆▇█", soft_wrap=True)
    assert said() == expected + "\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("words", [["methods"], ["plan", "tiny"], ["recipes", "ls"]], ids=str)
def test_commands_print_in_any_encoding(printed, encoding, words):
    said = printed(encoding)
    main(words)
    assert said().strip()


def test_a_json_document_is_ascii(printed):
    said = printed("ascii")
    main(["methods", "--json"])
    assert json.loads(said())


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["schema"]], ids=str)
def test_a_reader_that_leaves_is_no_error(monkeypatch, capsys, words):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stdout:  # noqa: PTH123 a descriptor
        monkeypatch.setattr(sys, "stdout", stdout)
        with contextlib.suppress(SystemExit):  # 1, where it was known before the last line
            main(words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("words", [["methods"], ["methods", "--json"], ["schema"]], ids=str)
def test_a_full_disk_under_stdout_is_said_in_a_line(monkeypatch, capsys, words):
    with Path("/dev/full").open("w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as refused:
            main(words)
    assert refused.value.code == 6
    assert capsys.readouterr().err == "StorageError: stdout: No space left on device\n"


@pytest.mark.parametrize(
    "words",
    [
        ["status", "caf\udce9.run"],
        ["run", "caf\udce9", "--dry-run"],
        ["run", "-r", "caf\udce9.yaml"],
        ["data", "lint", "caf\udce9.txt"],
        ["run", "--option", "modules=caf\udce9"],
    ],
    ids=str,
)
def test_a_name_that_is_not_utf8_is_refused_in_a_line(capsys, words):
    with pytest.raises(SystemExit) as refused:
        main([*words, "--json"])
    assert refused.value.code == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["error"]["message"].endswith(
        ": the name is not UTF-8, as recipes and reports require"
    )
    assert "caf\\xe9" in said.err
    assert len(said.err.splitlines()) == 2


def test_no_directory_is_below_one_whose_name_is_not_utf8(tmp_path, monkeypatch):
    (tmp_path / "caf\udce9").mkdir()
    monkeypatch.chdir(tmp_path / "caf\udce9")
    with pytest.raises(StorageError, match=r"caf\\xe9/run: the name is not UTF-8"):
        Directory("run")
    (tmp_path / "link").symlink_to(tmp_path / "caf\udce9")
    with pytest.raises(StorageError, match="not UTF-8"):
        Directory(str(tmp_path / "link"))


def test_a_file_inside_a_directory_whose_name_is_not_utf8_is_named(tmp_path):
    (tmp_path / "caf\udce9.json").write_text("{}")
    with pytest.raises(
        StorageError, match=r"contains a file whose name is not UTF-8: .*/caf\\xe9.json"
    ):
        Directory(str(tmp_path)).names()


def test_half_a_letter_in_a_recipe_is_no_name(tmp_path):
    with pytest.raises(StorageError, match="not UTF-8"):
        attempt(tmp_path, "runs/\ud800")
