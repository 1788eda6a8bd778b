"""A user goes through the pages from top to bottom: each command that needs no cluster is run.

The model, the texts and the finished run that they speak of are there, small. What needs a
bucket, a cluster or the Hub is left to the tests that start those.
"""

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.cli import main
from tests.builders import run_local, save_model
from tests.test_documents import CHEAP, COMMANDS, ROOT

ELSEWHERE = ("s3://", "auto", "august.yaml", "mistralai/", "submit", "llama-2-")
TINY = ROOT / "actors" / "models" / "tiny"
LOCAL = [
    words
    for words in COMMANDS
    if not any(word.startswith(ELSEWHERE) for word in words)
    and not " ".join(words).startswith(CHEAP)
]

pytestmark = [pytest.mark.ray, pytest.mark.nightly]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the page speaks of."""
    folder = tmp_path_factory.mktemp("desk")
    save_model(folder / "my-llama", vocab_size=512, max_position_embeddings=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / "my-llama" / name)
    write_texts(folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    run_local(TINY, folder / "runs" / "demo")
    run_local(folder / "my-llama", folder / "runs" / "my-llama")
    return folder


def write_texts(folder):
    """Write two texts of the interpreter's own library that share no file."""
    sources = sorted(Path(shutil.__file__).parent.glob("*.py"))
    for name, part in (("train", sources[::2]), ("held-out", sources[1::2])):
        lines = [json.dumps({"text": path.read_text(errors="replace")}) for path in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_the_page_has_commands_of_every_kind_that_a_laptop_can_run():
    kinds = {words[0] for words in LOCAL}
    assert {"plan", "run", "sweep", "export", "eval", "bench", "batch"} <= kinds


@pytest.mark.parametrize("words", LOCAL, ids=" ".join)
def test_it_runs(words, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    known = {"PATH_OF_THE_DENSE_MODEL": "my-llama", "NAME": some_point(desk)}
    main([*(known.get(word, word) for word in words), *(["--yes"] if words[0] == "run" else [])])
    assert capsys.readouterr().out.strip()


def some_point(desk):
    points = sorted((desk / "runs" / "base" / "points").glob("*"))
    return points[0].name if points else ""
