import pytest

from planners.errors import ModelError
from planners.families import family_of
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


def test_a_family_that_is_nearly_known_is_named():
    with pytest.raises(ModelError, match=r"supported: .*; did you mean mistral\?"):
        family_of("mistal")
