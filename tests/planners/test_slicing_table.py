"""Nominal slicing removes fewer parameters than it says, from the configs of known models alone."""

import pytest

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners import families
from planners.method import Target
from planners.model.cost import dense_parameters, dense_start, model_parameters

SLICES = (0.10, 0.20, 0.25, 0.30, 0.40, 0.50)
LLAMA_2 = {"model_type": "llama", "vocab_size": 32000}
CONFIGS = {
    "llama-2-7b": LLAMA_2
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-2-13b": LLAMA_2
    | {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
    "llama-2-70b": LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
}
PERCENT_REMOVED = {
    "llama-2-7b": (-3.0, 9.4, 15.3, 21.5, 33.2, 44.6),
    "llama-2-13b": (-3.2, 9.3, 15.5, 21.5, 33.4, 45.0),
    "llama-2-70b": (-2.6, 9.9, 16.0, 22.2, 34.1, 45.7),
    "llama-3-8b": (-1.4, 10.1, 15.6, 21.3, 32.3, 43.0),
}
SPEC = methods.spec("slicegpt")


def shape_of(name):
    return families.family_of("llama").shape_of(CONFIGS[name], "bfloat16")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dense_model_has_the_published_number_of_parameters(name):
    assert dense_parameters(shape_of(name)) == PARAMETERS[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_nominal_slices_remove_what_the_table_says(name):
    shape, options = shape_of(name), resolve_options(SPEC, {})
    forms = [
        SPEC.form(shape, dense_start(shape), Target(slice=fraction), options) for fraction in SLICES
    ]
    kept = [model_parameters(shape, form) / dense_parameters(shape) for form in forms]
    assert tuple(round(100 * (1 - fraction), 1) for fraction in kept) == PERCENT_REMOVED[name]


def test_one_rotation_for_all_sites_removes_at_least_what_was_asked_for_of_a_large_model():
    shape, options = shape_of("llama-2-70b"), resolve_options(SPEC, {"rotation": "shared"})
    form = SPEC.form(shape, dense_start(shape), Target(slice=0.25), options)
    assert form.native
    assert model_parameters(shape, form) <= 0.75 * dense_parameters(shape)
