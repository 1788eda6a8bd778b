"""What cannot be quantised, or is already: refused before any work, with what is possible."""

import json
import re

import pytest

from actors.storage.quantised import quantisation_config
from orchestrator.cli.options import step_of
from orchestrator.recipe.config import bytes_of
from planners.errors import ConfigError, ModelError, PlanError
from planners.model.scheme import Scheme
from tests.bad_input.refusals import attempt, refusal

GPTQ = {"slice": None, "method": "gptq"}
OPTIONS = {
    "no bits": ({"bits": 1}, "options.bits: is 1; it must be one of: 2, 3, 4, 5, 6, 7, 8"),
    "too many bits": ({"bits": 9}, "options.bits: is 9; it must be one of: 2, 3, 4, 5, 6, 7, 8"),
    "half a bit": ({"bits": 3.5}, "options.bits: is 3.5; it must be"),
    "a group of 24": ({"group": 24}, "options.group: is 24; it must be one of: 0, 2, 4, 8, 16"),
    "no such grid": ({"format": "int3"}, "it must be one of: int, nvfp4, mxfp4, fp8"),
    "a zero point of floats": (
        {"format": "nvfp4", "symmetric": False},
        "symmetric=false: values of format=nvfp4 have no zero point",
    ),
    "an embedding of 3 bits": (
        {"embedding": 3},
        "options.embedding: is 3; it must be one of: 0",
    ),
    "bits that the budget chooses": ({"schemes": "1/32"}, "'1/32' is no scheme; it must be BITS"),
    "a tie of another kind": ({"schemes": "4/32", "tie": "all"}, "must be one of: fused, free"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_without_a_format_are_refused_with_those_that_have_one(refused, case):
    options, words = OPTIONS[case]
    size = {"keep_bytes": "100kB"} if "schemes" in options else {}
    error = PlanError if "symmetric" in options else ConfigError
    refused(error, words, **GPTQ, options=options, **size)


@pytest.mark.parametrize(("group", "name", "width"), [(128, "q_proj", 32), (32, "down_proj", 56)])
def test_a_group_that_does_not_divide_is_refused_with_the_largest_that_does(
    model, refused, tmp_path, group, name, width
):
    said = refused(
        PlanError, f"layer 0, {name}: a group of {group} does not divide its rows of {width}",
        **GPTQ, options={"group": group},
    )  # fmt: skip
    nearest = int(re.search(r"use group=(\d+), the largest that divides every width", said)[1])
    assert nearest == 8
    for options in ({"group": nearest}, {"group": group, "uneven": "smaller"}):
        plan = attempt(model, tmp_path / "run", **GPTQ, options=options).plan
        assert plan.bytes_after < plan.bytes_before


@pytest.mark.parametrize("grid", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("uneven", ["refuse", "smaller"])
def test_the_group_of_small_floats_is_not_made_smaller(refused, grid, uneven):
    options = {"format": grid, "uneven": uneven}
    said = refused(
        PlanError, "does not divide its rows of 56", **GPTQ, options=options, dtype="bfloat16"
    )
    assert said.endswith(
        f"use format=int with group=8, the largest that divides every width; the group of "
        f"format={grid} is fixed"
    )


@pytest.mark.parametrize("size", [{"keep_fraction": 0.8}, {"slice": 0.2}])
def test_a_share_of_the_parameters_is_no_size_of_a_quantiser(refused, size):
    refused(
        PlanError, "gptq removes no parameters; it stores them in fewer bits",
        "use --option bits=4, --bits 4.2 or --keep-bytes 4GB",
        method="gptq", **{"slice": None, **size},
    )  # fmt: skip


@pytest.mark.parametrize("method", ["modegpt", "gptq"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_budget_of_bytes_below_the_floor_names_the_least_which_passes(
    model, refused, tmp_path, method, dtype
):
    same = {"slice": None, "method": method, "dtype": dtype}
    said = refused(PlanError, "keep_bytes: 1,000 bytes are too few", **same, keep_bytes="1kB")
    nearest = re.search(r"use --keep-bytes (\w+) or more", said)[1]
    plan = attempt(model, tmp_path / "run", **same, keep_bytes=nearest).plan
    assert plan.bytes_after <= bytes_of(nearest)
    assert ("--dtype bfloat16" in said) == (dtype == "auto")  # of a float32 model


def test_a_budget_of_bits_below_the_floor_names_the_least_which_passes(model, refused, tmp_path):
    said = refused(PlanError, "bits: 2 a weight are too few", **GPTQ, bits=2)
    nearest = float(re.search(r"use --bits ([0-9.]+) or more", said)[1])
    attempt(model, tmp_path / "run", **GPTQ, bits=nearest)


SIZES = {
    "two of them": ({"keep_bytes": "1MB", "bits": 4}, "keep_bytes, bits: both are given"),
    "a share beside bytes": ({"keep_fraction": 0.5, "keep_bytes": "1MB"}, "both are given"),
    "a space": ({"keep_bytes": "4 GB"}, "keep_bytes: is '4 GB'; it must be a size such as 4GB"),
    "no unit": ({"keep_bytes": "4000"}, "it must be a size such as 4GB"),
    "no bits": ({"bits": 0}, "bits: is 0; it must be a number above 0 and up to 32, such as 3.5"),
    "more bits than a float": ({"bits": 33}, "it must be a number above 0 and up to 32"),
    "dtype of eight bits": ({"dtype": "float8"}, "dtype: is 'float8'; it must be auto, float32"),
    "dtype abbreviated": ({"dtype": "bf16"}, "bfloat16 or float16; did you mean bfloat16?"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_and_dtypes_that_cannot_be_read_are_refused(refused, case):
    recipe, words = SIZES[case]
    refused(ConfigError, words, slice=None, method="modegpt", **recipe)


def test_bytes_are_refused_of_a_method_that_measures_no_damage(refused):
    refused(
        PlanError, "keep_bytes, bits: slicegpt does not choose widths by measured damage",
        "use --method modegpt or gptq", slice=None, method="slicegpt", keep_bytes="100kB",
    )  # fmt: skip


def test_schemes_are_refused_where_no_bytes_are_counted(refused):
    refused(
        PlanError, "schemes: are chosen by what they save", "use --keep-bytes, --bits or --fit",
        method="modegpt", keep_fraction=0.8, options={"schemes": "4/32"},
    )  # fmt: skip


@pytest.mark.parametrize("last", [{"method": "gptq"}, {"method": "modegpt", "keep_fraction": 0.8}])
def test_nothing_follows_a_step_that_quantises(refused, last):
    refused(
        ConfigError, "steps[0]: gptq quantises, and nothing can cut or round what is quantised",
        f"as steps[1], {last['method']}, would", "make it the last step",
        slice=None, steps=[{"method": "gptq", "options": {"group": 8}}, last],
    )  # fmt: skip


def test_a_step_that_quantises_has_options_and_no_size(model, refused, tmp_path):
    steps = [{"method": "modegpt", "keep_fraction": 0.8}, step_of("gptq:0.5")]
    refused(
        ConfigError, "steps[1].keep_fraction, slice: gptq removes no parameters; give options such",
        slice=None, steps=steps,
    )  # fmt: skip
    steps[1] = step_of("gptq:bits=4:group=8")
    assert attempt(model, tmp_path / "run", slice=None, steps=steps).plan.bytes_after > 0
    refusal(ConfigError, lambda: step_of("gptq2"), "--step gptq:bits=4:group=64")


def test_a_group_must_divide_what_the_steps_before_leave(model, refused, tmp_path):
    first = {"method": "modegpt", "keep_fraction": 0.8}

    def steps(group):
        return [first, {"method": "gptq", "options": {"group": group}}]

    said = refused(PlanError, "steps[1]: layer 0, ", "does not divide", slice=None, steps=steps(32))
    nearest = int(re.search(r"use group=(\d+), the largest that divides every width", said)[1])
    attempt(model, tmp_path / "run", slice=None, steps=steps(nearest))


FOREIGN = {
    "of another program": {"quant_method": "gptq", "bits": 4},
    "by classes": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
    },
    "by patterns": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "targets": ["re:.*q_proj"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32},
            }
        },
    },
    "a text": "int4",
    "groups a list": {"config_groups": [1, 2]},
    "groups of nothing": {"config_groups": {"group_0": None}},
    "bits a text": {"config_groups": {"g": {"targets": ["a"], "weights": {"num_bits": "many"}}}},
    "targets a number": {"config_groups": {"g": {"targets": 7, "weights": {"num_bits": 4}}}},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_model_that_others_quantised_is_refused(refused, edit, case):
    edit("config.json", quantization_config=FOREIGN[case])
    refused(
        ModelError, "has quantization_config: quantised weights cannot be compressed; use the "
        "original ones",
    )  # fmt: skip


def test_a_model_that_was_quantised_here_is_refused(refused, edit):
    module = "model.layers.0.self_attn.q_proj"
    ours = quantisation_config({module: Scheme(bits=4, group=32)})
    edit("config.json", quantization_config=json.loads(json.dumps(ours)))
    refused(ModelError, "is quantised already", "use the original weights")
    refused(ModelError, "is quantised already", "use the original weights", **GPTQ)
