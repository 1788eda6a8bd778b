"""The recipe: what wins, what is refused with which words, and what is written back."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.recipe.config import Facts, RunConfig, StepConfig, resolved, to_yaml, with_tokens
from orchestrator.recipe.method_options import resolve_options
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError
from planners.method import MethodSpec, OptionSpec, Target

SPEC = MethodSpec(
    name="shrink",
    revision=1,
    source="",
    modules=("mlp",),
    options=(
        OptionSpec(name="rotation", default="per_site", choices=("per_site", "shared")),
        OptionSpec(name="round_to", default=8, minimum=1),
        OptionSpec(name="damping", default=0.01, minimum=0),
        OptionSpec(name="refit", default=True),
    ),
    residual=False,
    statistics=lambda _shape, _options: frozenset(),
    refuses=lambda _shape, _options: "",
    form=lambda _shape, _target, _options: pytest.fail("not asked for here"),
)
DEFAULTS = {"rotation": "per_site", "round_to": 8, "damping": 0.01, "refit": True}
FACTS = Facts(
    model_name="tiny",
    longest=256,
    options=(DEFAULTS,),
    device="cpu",
    calibration_dtype="float32",
    worker_gib=4.0,
)


@pytest.fixture
def recipe(tmp_path):
    """Return a function that writes a recipe and returns its path."""
    path = tmp_path / "recipe.yaml"

    def write(text):
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(recipe_path=None, **overrides):
    """Return message and hint of the refusal of a recipe."""
    with pytest.raises(ConfigError) as caught:
        load_config(recipe_path, overrides)
    return f"{caught.value}; {caught.value.hint}"


def option_refusal(**options):
    with pytest.raises(ConfigError) as caught:
        resolve_options(SPEC, options)
    return f"{caught.value}; {caught.value.hint}"


def test_import_does_not_load_the_slow_libraries():
    program = (
        "import sys, orchestrator.recipe.config;"
        "print({'torch', 'ray', 'transformers', 'numpy', 'pyarrow'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("set()\n", "")


def test_nothing_given_is_the_embedded_default():
    config = load_config(None, {})
    assert config == RunConfig()
    assert (config.model, config.address) == ("tiny", "local")
    assert config.chain == [StepConfig(method="modegpt", keep_fraction=0.8)]


def test_a_nominal_slice_without_a_method_is_slicegpt():
    assert load_config(None, {"slice": 0.25}).chain == [StepConfig(method="slicegpt", slice=0.25)]
    config = load_config(None, {"slice": 0.25, "method": "modegpt"})
    assert config.chain == [StepConfig(method="modegpt", slice=0.25)]


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_recipe_is_all_defaults(recipe, text):
    assert load_config(recipe(text), {}) == RunConfig()


def test_the_command_line_wins_over_the_recipe(recipe):
    path = recipe("seed: 1\ncalibration: {source: stdlib, sequences: 4}\noptions: {round_to: 16}\n")
    config = load_config(
        path, {"seed": 2, "calibration.sequences": 8, "options.refit": "false", "workers": None}
    )
    assert (config.seed, config.workers) == (2, 1)
    assert (config.calibration.source, config.calibration.sequences) == ("stdlib", 8)
    assert config.options == {"round_to": 16, "refit": "false"}


def test_a_size_on_the_command_line_replaces_the_other_kind_in_the_recipe(recipe):
    assert load_config(recipe("keep_fraction: 0.5"), {"slice": 0.25}).target == Target(slice=0.25)
    assert load_config(recipe("slice: 0.25"), {"keep_fraction": 0.5}).target == Target(
        keep_fraction=0.5
    )


def test_two_sizes_are_refused(recipe):
    assert "both are given" in refusal(keep_fraction=0.5, slice=0.25)
    assert "both are given" in refusal(recipe("keep_fraction: 0.5\nslice: 0.25\n"))


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.01, 80, float("nan"), float("inf"), "80%"])
def test_keep_fraction_outside_its_range_is_refused_with_the_range(value):
    message = refusal(keep_fraction=value)
    assert "keep_fraction: is " in message
    assert "above 0 and up to 1" in message


@pytest.mark.parametrize("value", [-0.1, 1, 25, float("nan"), True])
def test_slice_outside_its_range_is_refused_with_the_range(value):
    message = refusal(slice=value)
    assert "slice: is " in message
    assert "from 0 and below 1" in message


def test_the_ends_of_the_ranges_are_possible():
    assert load_config(None, {"keep_fraction": 1}).target == Target(keep_fraction=1.0)
    assert load_config(None, {"slice": 0}).target == Target(slice=0.0)


@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("calibration.sequences", "many", "a whole number from 1"),
        ("calibration.sequences", 0, "a whole number from 1"),
        ("calibration.sequences", 1.5, "a whole number from 1"),
        ("calibration.sequences", True, "a whole number from 1"),
        ("calibration.sequence_length", 1, "a whole number from 2"),
        ("calibration.bos", 1, "true or false"),
        ("evaluation.source", 3, "tokens:FILE.safetensors"),
        ("calibration", "stdlib", "a mapping with keys of: source, sequences"),
        ("options", ["round_to"], "a mapping from option to value"),
        ("options.round_to", [8], "a text or a number"),
        ("device", "gpu", "auto, cpu or cuda"),
        ("workers", 0, "a whole number from 1"),
        ("seed", -1, "a whole number from 0"),
        ("worker_gib", 0, "a number above 0, in GiB"),
        ("model", "", "a Hub id"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path_and_what_would_be_right(key, value, right):
    message = refusal(**{key: value})
    assert message.startswith(f"{key}: is ")
    assert f"it must be {right}" in message or right in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("modle: tiny", "modle", "did you mean model?"),
        (
            "calibration: {sequnces: 3}",
            "calibration.sequnces",
            "did you mean calibration.sequences?",
        ),
        ("sequence_length: 3", "sequence_length", "did you mean calibration.sequence_length?"),
        ("sequences: 3", "sequences", "calibration.sequences or evaluation.sequences?"),
        ("zzz: 3", "zzz", "known here: model, model_store, out, method"),
        ("evaluation: {zzz: 3}", "evaluation.zzz", "known here: source, sequences"),
        ("1: 3", "1", "known here: model"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known(recipe, text, key, nearest):
    message = refusal(recipe(text))
    assert message.startswith(f"{key}: unknown key; ")
    assert nearest in message


def test_every_wrong_key_is_named_at_once(recipe):
    message = refusal(recipe("seed: x\nthreads: 0\ncalibration: {bos: 3}\n"))
    assert all(f"{key}: is " in message for key in ("seed", "threads", "calibration.bos"))


def test_an_override_does_not_hide_a_section_that_is_no_mapping(recipe):
    message = refusal(recipe("calibration: 5"), **{"calibration.source": "stdlib"})
    assert message.startswith("calibration: is 5; it must be a mapping")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("model: tiny\nseed: [1\n", ", line 3: is not YAML"),
        ("model: tiny\n\tseed: 1\n", ", line 2: is not YAML"),
        ("model: !!python/object:os.system {}\n", ", line 1: is not YAML"),
        ("- model\n", ": is a list; it must be a mapping"),
        ("tiny\n", ": is a str; it must be a mapping"),
        ("seed: 2020-99-99\n", ": is not YAML"),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_refused_with_its_place(recipe, text, complaint):
    path = recipe(text)
    assert f"{path}{complaint}" in refusal(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path):
    missing, latin = tmp_path / "missing.yaml", tmp_path / "latin.yaml"
    latin.write_bytes(b"model: caf\xe9")
    for path in (missing, tmp_path, latin):
        assert f"recipe {path}: " in refusal(str(path))


def test_options_that_are_not_given_have_the_defaults_of_the_method():
    assert resolve_options(SPEC, {}) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rotation", "shared", "shared"),
        ("round_to", "16", 16),
        ("damping", "1e-3", 0.001),
        ("damping", 1, 1.0),
        ("refit", "false", False),
        ("refit", "True", True),
        ("refit", False, False),
    ],
)
def test_a_text_becomes_the_type_of_the_default(name, text, value):
    options = resolve_options(SPEC, {name: text})
    assert options == {**DEFAULTS, name: value}
    assert type(options[name]) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("rotation", "per_layer", "one of: per_site, shared"),
        ("rotation", 3, "a text"),
        ("round_to", "0", "1 or more"),
        ("round_to", "eight", "a whole number"),
        ("round_to", 8.5, "a whole number"),
        ("round_to", True, "a whole number"),
        ("damping", "-1", "0 or more"),
        ("damping", "nan", "a number"),
        ("refit", "yes", "true or false"),
        ("refit", 1, "true or false"),
    ],
)
def test_a_wrong_option_is_refused_with_what_would_be_right(name, value, right):
    assert option_refusal(**{name: value}).startswith(
        f"options.{name}: is {value!r}; it must be {right}"
    )


def test_an_unknown_option_is_refused_with_those_of_the_method():
    message = option_refusal(rotaton="shared")
    assert "options.rotaton: shrink has no such option; did you mean rotation?" in message
    assert "rotation=per_site, round_to=8, damping=0.01, refit=true" in message


def test_a_resolved_recipe_leaves_nothing_open_but_the_size_not_chosen():
    config = with_tokens(
        resolved(RunConfig(), FACTS), FACTS, calibration=(96, 256), evaluation=(48, 256)
    )
    left = {key for key, value in config.model_dump().items() if value in (None, "", "auto")}
    sizes = {"slice", "speedup", "fit", "keep_bytes", "bits"}
    assert left == {"model_store", "stats", "multiple_of", "dtype", *sizes}
    assert None not in {*config.calibration.model_dump().values(), config.evaluation.sequences}
    assert config.options == DEFAULTS


def test_what_was_given_is_not_changed_by_resolving():
    typed = load_config(
        None,
        {
            "out": "here",
            "method": "svdllm",
            "keep_fraction": 0.5,
            "calibration.source": "wikitext2",
            "calibration.sequences": 3,
            "calibration.sequence_length": 64,
            "evaluation.source": "a.txt",
            "device": "cuda",
            "calibration_dtype": "bfloat16",
            "worker_gib": 2,
            "serving.context": 256,
        },
    )
    config = resolved(typed, replace(FACTS, options=({},)))
    assert config == typed


@pytest.mark.parametrize(
    ("size", "folder"),
    [
        ({}, "runs/tiny-modegpt-keep0.80"),
        ({"keep_fraction": 0.7}, "runs/tiny-modegpt-keep0.70"),
        ({"keep_fraction": 0.705}, "runs/tiny-modegpt-keep0.705"),
        ({"slice": 0.25}, "runs/tiny-slicegpt-slice0.25"),
    ],
)
def test_the_default_folder_says_model_method_and_size(size, folder):
    assert resolved(load_config(None, size), FACTS).out == folder


@pytest.mark.parametrize(
    ("model", "calibration", "sources"),
    [
        ("tiny", "", ("embedded", "embedded")),
        ("./tiny", "", ("stdlib", "stdlib")),
        ("tiny", "stdlib", ("stdlib", "stdlib")),
        ("org/model", "wikitext2", ("wikitext2", "wikitext2")),
        ("org/model", "tokens:a.safetensors", ("tokens:a.safetensors", "stdlib")),
        ("tiny", "a.txt", ("a.txt", "embedded")),
    ],
)
def test_evaluation_uses_the_same_source_where_it_has_a_part_of_its_own(
    model, calibration, sources
):
    typed = load_config(None, {"model": model, "calibration.source": calibration})
    config = resolved(typed, FACTS)
    assert (config.calibration.source, config.evaluation.source) == sources


def test_text_is_as_long_as_the_model_takes_up_to_2048():
    typed = load_config(None, {"calibration.source": "stdlib"})
    for longest, length in ((256, 256), (131_072, 2048)):
        facts = replace(FACTS, longest=longest)
        assert resolved(typed, facts).calibration.sequence_length == length


def test_sequences_longer_than_the_model_takes_are_refused():
    with pytest.raises(ConfigError, match=r"sequence_length: is 512 tokens, .* at most 256 "):
        resolved(load_config(None, {"calibration.sequence_length": 512}), FACTS)


def test_another_length_than_a_file_of_tokens_holds_is_refused():
    typed = load_config(
        None, {"calibration.source": "tokens:a.safetensors", "calibration.sequence_length": 128}
    )
    with pytest.raises(ConfigError, match=r"is 128, but tokens:a\.safetensors holds .* 256 tokens"):
        with_tokens(resolved(typed, FACTS), FACTS, calibration=(4, 256), evaluation=(4, 256))


@pytest.mark.parametrize("key", ["calibration", "evaluation"])
def test_a_file_of_sequences_longer_than_the_model_takes_is_refused(key):
    typed = load_config(None, {f"{key}.source": "tokens:a.safetensors"})
    shapes = {"calibration": (4, 256), "evaluation": (4, 256), key: (4, 257)}
    with pytest.raises(ConfigError, match=rf"{key}\.source: .* 257 tokens, .* at most 256 "):
        with_tokens(resolved(typed, FACTS), FACTS, **shapes)


def test_only_what_was_not_given_is_marked_as_default():
    typed = load_config(
        None,
        {"slice": 0.25, "seed": 0, "device": "auto", "options.round_to": 16}
        | {"calibration.sequences": 4},
    )
    facts = replace(FACTS, options=[resolve_options(SPEC, typed.options)])
    lines = to_yaml(resolved(typed, facts), typed).splitlines()
    marked = {line.partition(":")[0].strip() for line in lines if line.endswith("  # default")}
    assert {"model", "rotation", "source", "keep_fraction", "device"} <= marked
    for line in ("slice: 0.25", "seed: 0", "  round_to: 16", "  sequences: 4"):
        assert line in lines


def test_a_resolved_recipe_is_a_recipe(recipe):
    typed = load_config(None, {"calibration.source": "stdlib", "slice": 0.25})
    config = resolved(typed, FACTS)
    assert load_config(recipe(to_yaml(config, typed)), {}) == config


names = st.text(min_size=1)
values = (
    st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans()
)


@given(options=st.dictionaries(names, values), out=st.text())
def test_any_text_survives_being_written(options, out):
    config = RunConfig(options=options, out=out)
    assert RunConfig.model_validate(yaml.safe_load(to_yaml(config, config))) == config
    assert RunConfig.model_validate(yaml.safe_load(to_yaml(config, RunConfig()))) == config
