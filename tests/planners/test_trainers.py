"""How many workers train a whole model: one if it fits, else as few as can divide its layers."""

from dataclasses import replace

import pytest

from planners.catalogue import CONFIGS
from planners.errors import PlanError
from planners.families import family_of
from planners.memory.peaks import LIBRARIES
from planners.memory.trainers import Room, trainers
from planners.memory.training import model_parts
from planners.model.cost import dense_model_form, layer_parameters, model_parameters
from planners.model.form import Link
from planners.recovery import Recovery

LLAMA_7B = family_of("llama").shape_of(CONFIGS["llama-2-7b"], "bfloat16")
FORM = dense_model_form(LLAMA_7B)
HOW = Recovery(mode="global", trains="all", steps=8, batch=8, parts=8, rates=(0.01,), held_out=1,
               sequences=32, length=512)  # fmt: skip


def needed(workers, how=HOW):
    own = model_parts(LLAMA_7B, FORM, LLAMA_7B, how, dtype="bfloat16", workers=workers)
    return sum(own.values()) + LIBRARIES


def found(worker_bytes, *, num_workers=8, how=HOW, form=FORM):
    return trainers(LLAMA_7B, form, how, Room("bfloat16", worker_bytes, num_workers))


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_as_few_workers_train_as_can_hold_the_model(workers):
    parts, fewest = found(needed(workers))
    assert fewest == workers
    assert sum(parts.values()) + LIBRARIES == needed(workers)
    assert parts == model_parts(LLAMA_7B, FORM, LLAMA_7B, HOW, dtype="bfloat16", workers=workers)


def test_workers_together_hold_each_layer_once_and_the_tables_each():
    layers = 4 * sum(layer_parameters(LLAMA_7B, layer) for layer in FORM.layers)
    tables = 4 * model_parameters(LLAMA_7B, FORM) - layers
    for workers in (2, 4, 8):
        parts = model_parts(LLAMA_7B, FORM, LLAMA_7B, HOW, dtype="bfloat16", workers=workers)
        assert parts["weights"] == tables + layers // workers
        assert parts["moments"] == 3 * layers // workers


def test_only_sizes_that_divide_the_parts_are_taken():
    how = replace(HOW, batch=6, parts=6)
    assert found(needed(4, how), how=how)[1] == 6


@pytest.mark.parametrize(
    ("num_workers", "how", "ways"),
    [
        (8, HOW, ["--recover local", "--recover-trains lora",
                  "--workers 16, with recover.parts 16 and a recover.batch of 16"]),
        (1, HOW, ["--recover local", "--workers 16"]),
        (8, replace(HOW, replace="linear"), ["--recover local"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(num_workers, how, ways):
    with pytest.raises(PlanError, match="too small to train the whole model") as caught:
        found(needed(16, replace(HOW, batch=16, parts=16)), num_workers=num_workers, how=how)
    for way in ways:
        assert way in caught.value.hint
    assert ("--workers" in caught.value.hint) == (how.replace == "none")
    over = f"divided over {num_workers} workers"
    assert (over in str(caught.value)) == (num_workers > 1 and how.replace == "none")


def test_layers_that_share_are_not_divided():
    first, second, *rest = FORM.layers
    sharing = replace(second, links={"up_proj": Link(layer=0, parts=("source",))})
    form = replace(FORM, layers=(first, sharing, *rest))
    with pytest.raises(PlanError, match="too small") as caught:
        found(needed(2), form=form)
    assert "--workers" not in caught.value.hint
