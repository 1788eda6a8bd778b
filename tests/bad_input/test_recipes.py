"""Recipes with every kind of mistake: refused by the key, before a model is looked at."""

import pytest

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError, DataError, PlanError
from tests.bad_input.refusals import attempt, refusal, within_limits


@pytest.fixture
def recipe(tmp_path):
    """Return a function that reads a recipe, and returns why it is refused."""
    path = tmp_path / "recipe.yaml"

    def read(data, *words, error_class=ConfigError):
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return refusal(error_class, lambda: _resolved(str(path)), *words)

    return read


def _resolved(path):
    (step,) = load_config(path, {}).chain
    return resolve_options(methods.spec(step.method), step.options)


NO_YAML = {
    "two colons": ("model: a: b", "line 1: is not YAML"),
    "open bracket": ("model: [tiny\nseed: 1", "is not YAML"),
    "open quote": ("model: 'tiny", "is not YAML"),
    "tab": ("calibration:\n\tsource: stdlib", "line 2: is not YAML"),
    "not text": (b"\x80\x81\x82", "is not YAML"),
    "control characters": (b"model: a\x00b", "is not YAML"),
    "alias of nothing": ("model: *nothing", "is not YAML"),
    "unhashable key": ("? [a, b]\n: c", "is not YAML"),
    "no such date": ("seed: 2026-99-99", "is not YAML"),
    "5,000 digits": ("seed: " + "9" * 5000, "is not YAML"),
    "a list": ("- model: tiny", "is a list; it must be a mapping"),
    "a word": ("tiny", "is a str; it must be a mapping"),
    "two documents": ("model: tiny\n---\nmodel: tiny", "is not YAML"),
}


@pytest.mark.parametrize("case", NO_YAML)
def test_what_is_no_recipe_is_refused(recipe, case):
    data, words = NO_YAML[case]
    recipe(data, "recipe.yaml", words)


WRONG = {
    "unknown key": ("modell: tiny", "modell: unknown key; did you mean model?"),
    "unknown inner key": ("calibration: {sources: 4}", "calibration.sources: unknown key; did you"),
    "key at the wrong level": ("sequences: 4", "calibration.sequences"),
    "a number as key": ("1: 2", "1: unknown key"),
    "null as key": ("null: 2", "unknown key"),
    "section a text": ("calibration: stdlib", "calibration: is 'stdlib'; it must be a mapping"),
    "section a list": ("evaluation: [stdlib]", "evaluation: is ['stdlib']; it must be a mapping"),
    "section null": ("calibration: null", "calibration: is empty; it must be a mapping"),
    "model a number": ("model: 7", "model: is 7; it must be a directory, a URI"),
    "model empty": ("model: ''", "model: is empty; it must be a directory"),
    "model a list": ("model: [tiny]", "model: is ['tiny']"),
    "keep_fraction zero": ("keep_fraction: 0", "keep_fraction: is 0; it must be a number above 0"),
    "keep_fraction over 1": ("keep_fraction: 1.3", "is 1.3; it must be a number above 0 and up to"),
    "keep_fraction percent": ("keep_fraction: 80%", "keep_fraction: is '80%'"),
    "keep_fraction text": ("keep_fraction: '0.8'", "keep_fraction: is '0.8'"),
    "keep_fraction NaN": ("keep_fraction: .nan", "keep_fraction: is nan"),
    "keep_fraction infinite": ("keep_fraction: .inf", "keep_fraction: is inf"),
    "keep_fraction true": ("keep_fraction: true", "keep_fraction: is True"),
    "slice one": ("slice: 1", "slice: is 1; it must be a number from 0 and below 1"),
    "slice negative": ("slice: -0.1", "slice: is -0.1"),
    "both sizes": ("keep_fraction: 0.8\nslice: 0.25", "keep_fraction, slice: both are given"),
    "workers zero": ("workers: 0", "workers: is 0; it must be a whole number from 1"),
    "workers fractional": ("workers: 1.5", "workers: is 1.5"),
    "threads negative": ("threads: -1", "threads: is -1"),
    "seed negative": ("seed: -1", "seed: is -1; it must be a whole number from 0"),
    "seed huge": ("seed: 9223372036854775808", "seed: is 9223372036854775808"),
    "seed yes": ("seed: yes", "seed: is True"),
    "sequences zero": ("calibration: {sequences: 0}", "calibration.sequences: is 0"),
    "one token": ("calibration: {sequence_length: 1}", "calibration.sequence_length: is 1"),
    "device unknown": ("device: tpu", "device: is 'tpu'; it must be auto, cpu or cuda"),
    "dtype unknown": ("calibration_dtype: int8", "calibration_dtype: is 'int8'"),
    "memory none": ("worker_gib: 0", "worker_gib: is 0; it must be a number above 0"),
    "flag a text": ("keep_statistics: 'no'", "keep_statistics: is 'no'; it must be true or false"),
    "options a list": ("options: [round_to=8]", "options: is ['round_to=8']; it must be a mapping"),
    "option a list": ("options: {round_to: [8]}", "options.round_to: is [8]; it must be a text or"),
    "option null": ("options: {round_to: null}", "options.round_to: is empty"),
    "option unknown": (
        "options: {roundto: 8}",
        "options.roundto: modegpt has no such option; did you mean round_to?; its options and",
    ),
    "option zero": ("options: {round_to: -1}", "options.round_to: is -1; it must be 0 or more"),
    "option fractional": ("options: {round_to: 8.5}", "round_to: is 8.5; it must be a whole num"),
    "option a word": ("options: {round_to: eight}", "round_to: is 'eight'; it must be a whole"),
    "choice unknown": (
        "{method: slicegpt, options: {rotation: none}}",
        "options.rotation: is 'none'; it must be one of: per_site, shared",
    ),
    "choice a flag": ("{slice: 0.2, options: {rotation: true}}", "options.rotation: is True"),
    "flag a number": ("options: {refit: 2}", "options.refit: is 2; it must be true or"),
    "method unknown": (
        "method: slicegtp",
        "method: unknown method 'slicegtp'; did you mean slicegpt?; available: basis_sharing, ",
    ),
    "method a path": ("method: ../slicegpt", "unknown method '../slicegpt'"),
    "method a module": ("method: __init__", "unknown method '__init__'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_refused_by_its_key(recipe, case):
    data, words = WRONG[case]
    recipe(data, words)


def test_all_mistakes_are_told_a_line_each(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("workers: 0\nseed: -1\nnonsense: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_config(str(path), {})
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "seed",
        "workers",
        "nonsense",
    ]


@pytest.mark.parametrize(
    "data",
    [
        "model: !!python/object/apply:os.system ['touch {}']",
        "model: !!python/object/new:os.system ['touch {}']",
        "!!python/object/apply:subprocess.check_call [['touch', '{}']]",
        "options: {{round_to: !!python/object/apply:eval [\"open('{}', 'w')\"]}}",
        "!!python/module:os",
        "model: !!python/name:os.system",
    ],
)
def test_tags_of_python_are_refused_and_not_run(recipe, canary, data):
    recipe(data.format(canary), "is not YAML: could not determine a constructor for the tag")


ALIASES = "\n".join(
    ["l0: &l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 20)]
)


@pytest.mark.parametrize("last", ["model: *l19", "options: {round_to: *l19}"])
def test_expanding_aliases_takes_no_memory(tmp_path, last):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"{ALIASES}\n{last}")
    with within_limits(), pytest.raises(ConfigError):
        load_config(str(path), {})


@pytest.mark.parametrize("path", ["missing.yaml", ".", "x" * 300, "a\0b", "/dev/null/recipe"])
def test_a_recipe_that_cannot_be_read_is_refused(path):
    with pytest.raises(ConfigError, match="recipe "):
        load_config(path, {})


def test_what_is_too_small_is_refused_with_the_nearest_possible(refused):
    said = refused(PlanError, "keep_fraction 0.01 cannot be met", keep_fraction=0.01)
    smallest = said.rpartition("--keep-fraction ")[2].split()[0]
    assert 0.01 < float(smallest) < 1


def test_the_nearest_possible_is_possible(model, refused, tmp_path):
    said = refused(PlanError, keep_fraction=0.01)
    smallest = float(said.rpartition("--keep-fraction ")[2].split()[0])
    plan = attempt(model, tmp_path / "run", keep_fraction=smallest).plan
    assert 0 < plan.keep_fraction <= smallest


def test_a_slice_that_leaves_nothing_is_refused_with_the_largest(model, refused, tmp_path):
    said = refused(PlanError, "leaves nothing", slice=0.9)
    largest = float(said.rpartition("--slice ")[2])
    assert attempt(model, tmp_path / "run", slice=largest).plan.keep_fraction < 1


def test_steps_wider_than_the_model_are_refused(refused):
    refused(PlanError, "leaves nothing", options__round_to=10**6)


def test_a_memory_below_the_embedding_is_refused_with_the_nearest(model, refused, tmp_path):
    said = refused(PlanError, "are too few", method="modegpt", slice=None, fit="1kB")
    nearest = said.rpartition("--fit ")[2].split()[0]
    assert (
        attempt(
            model, tmp_path / "run", method="modegpt", slice=None, fit=nearest
        ).plan.keep_fraction
        < 1
    )


def test_a_memory_that_holds_the_input_model_is_refused(refused):
    refused(PlanError, "nothing has to be cut", method="modegpt", slice=None, fit="900GB")


@pytest.mark.parametrize("method", ["slicegpt", "svdllm"])
def test_a_speed_up_of_a_method_without_widths_is_refused(refused, method):
    refused(
        PlanError,
        "has no widths whose times",
        "--method modegpt",
        method=method,
        slice=None,
        speedup=1.2,
    )


def test_a_worker_too_small_for_a_layer_is_refused_by_the_bytes_it_lacks(refused):
    refused(PlanError, "bytes too small for one layer", "with that much memory", worker_gib=1e-6)


def test_sequences_longer_than_the_model_takes_are_refused(refused):
    words = "calibration.sequence_length: is 1000 tokens, but the model accepts at most 40"
    refused(ConfigError, words, calibration__sequence_length=1000)


def test_more_sequences_than_can_be_counted_are_refused(refused):
    refused(DataError, "has 20 sequences", calibration__sequences=10**30)
    refused(DataError, "has 7 sequences", evaluation__sequences=8)


def _lists(depth):
    """Return 6 lists of 6 lists and so on, as YAML."""
    return "[" + ", ".join([_lists(depth - 1) if depth else "a"] * 6) + "]"


HOSTILE = {
    "lists of lists": ("seed: " + _lists(4), "seed: is ["),
    "nested YAML": ("model: " + "[" * 5000, "is not YAML"),
    "a number of 5,000 hexadecimal digits": ("seed: 0x" + "f" * 5000, "seed: is "),
    "an option of 400 digits": ("options: {round_to: " + "9" * 400 + "}", "round_to: is "),
    "an option for a terminal": ('options: {"a\\e]0;owned\\a": 1}', "has no such option"),
    "a key for a terminal": ('"a\\e]0;owned\\a": 1', "unknown key"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_recipe_is_refused(recipe, case):
    data, words = HOSTILE[case]
    recipe(data, words)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("workers", 10**400, id="workers"),
        pytest.param("worker_gib", 1e308, id="memory"),
        pytest.param("threads", 10**400, id="threads"),
        pytest.param("calibration__microbatch_tokens", 10**400, id="microbatch"),
    ],
)
def test_a_number_beyond_reason_is_refused_or_taken(model, tmp_path, key, value):
    try:
        attempt(model, tmp_path / "run", **{key: value})
    except ConfigError as error:
        assert key.replace("__", ".") in str(error)  # noqa: PT017 either is right
