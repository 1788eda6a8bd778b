import pytest

from planners.errors import ModelError
from planners.families import family_of, known_types
from planners.spelling import did_you_mean, nearest


def repr_short(value):
    return repr(value)[:12]


@pytest.mark.parametrize(
    ("word", "meant"),
    [("slicegp", "slicegpt"), ("SVDLLM", "svdllm"), ("modgpt", "modegpt"), ("prune", ""), ("", "")],
)
def test_the_nearest_word_is_found_whatever_its_case(word, meant):
    assert nearest(word, ["modegpt", "slicegpt", "svdllm"]) == meant


@pytest.mark.parametrize("word", [["llama"], None, 7, {"a": 1}, "llama" * 10**6], ids=repr_short)
def test_what_is_no_word_is_near_none(word):
    assert nearest(word, ["llama", "mistral"]) == ""


def test_a_question_is_asked_only_where_a_word_is_near():
    assert did_you_mean("Llama", ["llama"]) == "; did you mean llama?"
    assert did_you_mean("gpt2", ["llama", "mistral"]) == ""


@pytest.mark.parametrize(
    ("word", "meant"),
    [("mistal", "mistral"), ("lama", "llama"), ("LLaMA", "llama"), ("Qwen-2", "qwen2")],
)
def test_a_model_type_that_lacks_a_letter_is_named(word, meant):
    with pytest.raises(ModelError, match=rf"supported: .*; did you mean {meant}\?"):
        family_of(word)


@pytest.mark.parametrize(
    "word",
    ["mixtral", "llama4", "mllama", "llava", "gemma2", "qwen3_moe", "qwen", "phi3", "gpt_neox",
     "mistral3", "x" * 10**6],
    ids=repr_short,
)  # fmt: skip
def test_another_model_is_not_taken_for_a_misspelt_one(word):
    known = ", ".join(known_types())
    with pytest.raises(ModelError, match=rf"is not supported; supported: {known}$") as e:
        family_of(word)
    assert "planners/families" in e.value.hint
    assert len(str(e.value)) < 300


@pytest.mark.parametrize("value", ["", None, 3, ["llama"], {"a": 1}], ids=repr_short)
def test_a_model_type_that_is_no_word_is_refused_as_such(value):
    with pytest.raises(
        ModelError, match=r"model_type is .*; it must be one of: .*llama, ministral, mistral"
    ):
        family_of(value)
