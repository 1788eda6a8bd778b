"""Each thing that can be wrong with a text is put into one, and found."""

import json

import pytest

from orchestrator.cli.main import main
from orchestrator.lint.texts import lint_texts


def save(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def text_of(number):
    return " ".join(f"word{number}x{index}" for index in range(40))


def levels(source, **how):
    how = {"evaluation": "", "model": "", "sequence_length": 64, **how}
    return {m.name: m.level for m in lint_texts(source, **how)["measures"]}


def test_a_good_text_has_nothing_wrong(tmp_path):
    source = save(tmp_path / "a.jsonl", map(text_of, range(40)))
    held_out = save(tmp_path / "b.jsonl", map(text_of, range(100, 110)))
    found = levels(source, evaluation=held_out)
    assert set(found.values()) == {"ok"}
    assert {"duplicates", "short", "broken", "control", "overlap"} == set(found)


@pytest.mark.parametrize(
    ("name", "few", "many"),
    [
        ("duplicates", [text_of(0).upper()] * 4, [f"  {text_of(0)}"] * 40),
        ("short", ["a heading"] * 20, ["a heading"] * 400),
        ("broken", ["x\ufffd" * 10 + text_of(99)], ["\ufffd" * 400 + text_of(99)]),
        ("control", ["\x01" * 60 + text_of(99)], ["\x01" * 4000 + text_of(99)]),
    ],
)
def test_a_little_of_what_is_wrong_warns_and_a_lot_fails(name, few, many, tmp_path):
    good = [text_of(n) for n in range(40)]
    assert levels(save(tmp_path / "few.jsonl", good + few))[name] == "warning"
    assert levels(save(tmp_path / "many.jsonl", good + many))[name] == "error"


def test_text_that_is_measured_on_and_calibrated_on_is_found(tmp_path, capsys):
    source = save(tmp_path / "a.jsonl", map(text_of, range(40)))
    held_out = save(tmp_path / "b.jsonl", [text_of(n) for n in range(39, 49)])
    with pytest.raises(SystemExit) as left:
        main(["data", "lint", source, "--evaluation", held_out])
    assert left.value.code == 3
    said = capsys.readouterr()
    assert "overlap 10.00%" in said.out
    assert "over the limit: overlap" in said.err


def test_tokens_are_counted_with_the_tokenizer_of_a_model(tmp_path, capsys):
    source = save(tmp_path / "a.jsonl", map(text_of, range(60)))
    main(["data", "lint", source, "--model", "tiny", "--sequence-length", "64", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["texts"] == 60
    assert found["tokens"] == found["sequences"] * 64
    assert sum(found["length_histogram"].values()) == 60
    assert found["share_of_it"] == 1.0  # every sequence begins with BOS
    assert found["scripts"] == {"Latin": 1.0}


def test_of_several_texts_it_says_how_much_is_of_each_and_names_the_one_that_fails(
    tmp_path, capsys
):
    large = save(tmp_path / "large.jsonl", map(text_of, range(60)))
    small = save(tmp_path / "small.jsonl", [*map(text_of, range(100, 110)), *[text_of(100)] * 9])
    with pytest.raises(SystemExit) as left:
        main(["data", "lint", large, small])
    assert left.value.code == 3
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == f"DataError: {small}: over the limit: duplicates"
    shares = [line for line in said.out.splitlines() if "% of the characters" in line]
    assert [line.split()[0] for line in shares] == [large, small]
    assert sum(float(line.split()[1].rstrip("%")) for line in shares) == pytest.approx(100, abs=0.2)
