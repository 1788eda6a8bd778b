"""Readers of what strangers write, on input that nobody thought of: refused, or taken as it is."""

import json
import string

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from actors import methods
from actors.storage.headers import DTYPE_BYTES, parse_header, parse_length
from orchestrator.recipe.config import RunConfig
from orchestrator.recipe.method_options import resolve_options
from orchestrator.recipe.reading import load_config
from planners.errors import CompressionError, ConfigError, ModelError
from planners.families import family_of
from tests.bad_input.test_headers import DATA, PAIR, file_of

numbers = st.integers() | st.integers(-4, 40) | st.floats() | st.sampled_from([2**31, 2**63, 2**64])
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(max_size=4), t, max_size=3)
)


def outcome(call):
    """Return what a call returns, or the refusal that it raises."""
    try:
        return call()
    except CompressionError as error:
        return error


def read(data):
    """Return the tensors of a file held in memory."""
    length = parse_length(data[:8], file_bytes=len(data), where="file")
    return parse_header(data[8 : 8 + length], file_bytes=len(data), where="file")


def agrees_with_the_reference(data):
    """See that what is taken is taken by the reference reader too, with the same meaning."""
    entries = outcome(lambda: read(data))
    if isinstance(entries, ModelError):
        assert str(entries).startswith("file: ")
        assert len(str(entries)) < 2000
        return
    try:
        found = dict(deserialize(data))
    except SafetensorError as error:
        raise AssertionError(f"the reference refuses it: {error}") from error
    assert found.keys() == entries.keys()
    for name, entry in entries.items():
        assert tuple(found[name]["shape"]) == entry.shape
        assert bytes(found[name]["data"]) == data[entry.start : entry.start + entry.size]


@given(st.binary(max_size=200))
@example(b"")
@example(file_of(PAIR))
@example(file_of({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b""))
def test_any_bytes_are_refused_or_understood_as_the_reference_does(data):
    agrees_with_the_reference(data)


@given(st.binary(max_size=120), st.binary(max_size=16))
def test_any_header_of_the_right_length_is_refused_or_understood(header, data):
    agrees_with_the_reference(file_of(header, data))


@given(st.dictionaries(st.text(max_size=8), trees, max_size=4), st.binary(max_size=16))
def test_any_json_as_header_is_refused_or_understood(header, data):
    agrees_with_the_reference(file_of(header, data))


dims = st.lists(st.integers(-1, 4) | scalars, max_size=9)
offsets = st.lists(st.integers(-1, 20) | scalars, max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BYTES)) | scalars,
        "shape": dims | trees,
        "data_offsets": offsets | trees,
    },
    optional={"more": scalars},
)


@given(st.dictionaries(st.text(max_size=3), entries, max_size=3), st.integers(0, 40))
def test_any_entries_are_refused_or_understood(header, size):
    agrees_with_the_reference(file_of(header, bytes(size)))


@given(
    st.lists(
        st.tuples(st.sampled_from(["F32", "BF16", "I8"]), st.lists(st.integers(0, 3), max_size=3)),
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_sound_files_are_understood_in_any_order(layout, random):
    header, end = {}, 0
    for number, (dtype, shape) in enumerate(layout):
        size = DTYPE_BYTES[dtype]
        for dim in shape:
            size *= dim
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    names = list(header)
    random.shuffle(names)
    data = file_of({name: header[name] for name in names}, bytes(end))
    assert read(data).keys() == header.keys()
    agrees_with_the_reference(data)


@given(st.data())
def test_a_sound_file_with_some_bytes_changed_is_refused_or_understood(data):
    mutated = bytearray(file_of(PAIR, DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        how = data.draw(st.sampled_from(["set", "insert", "delete", "digit"]))
        if how == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif how == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif how == "delete":
            del mutated[at]
        else:
            mutated[at : at + 1] = data.draw(st.sampled_from(string.digits + "-.eE")).encode()
        if not mutated:
            break
    agrees_with_the_reference(bytes(mutated))


CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "vocab_size": 512,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "rms_norm_eps": 1e-5,
}
KEYS = (
    *CONFIG, "num_key_value_heads", "head_dim", "hidden_act", "dtype", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "sliding_window", "max_position_embeddings", "quantization_config",
    "attn_implementation", "partial_rotary_factor", "rope_theta",
)  # fmt: skip
rope = st.dictionaries(
    st.sampled_from(["rope_type", "type", "factor", "rope_theta", "low_freq_factor",
                     "high_freq_factor", "short_factor", "long_factor", "partial_rotary_factor"]),
    scalars | st.sampled_from(["linear", "llama3", "longrope"]) | st.lists(numbers, max_size=4),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(KEYS), trees | rope, max_size=4))
def test_any_config_is_refused_or_has_a_shape(changes):
    config = json.loads(json.dumps({**CONFIG, **changes}))
    shape = outcome(lambda: family_of(config["model_type"]).shape_of(config, "float32"))
    if isinstance(shape, ModelError):
        assert len(str(shape)) < 2000
    else:
        assert shape.head_dim % 2 == 0
        assert shape.num_layers * shape.hidden * shape.vocab_size > 0


def is_refused_or_taken(path, overrides):
    def call():
        config = load_config(path, overrides)
        return resolve_options(methods.spec(config.method), config.options)

    assert isinstance(outcome(call), ConfigError | dict)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Where a recipe is written."""
    return tmp_path_factory.mktemp("fuzz") / "recipe.yaml"


keys = st.sampled_from([*RunConfig.model_fields, "source", "round_to", "rotation"]) | st.text(
    max_size=6
)
values = st.recursive(
    scalars | st.dates() | st.binary(max_size=4) | st.sampled_from(["slicegpt", "per_site", "8"]),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(keys | scalars, v, max_size=4),
)


@given(st.dictionaries(keys | scalars, values, max_size=5))
def test_any_mapping_as_recipe_is_refused_or_taken(recipe, mapping):
    recipe.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    is_refused_or_taken(str(recipe), {})


@given(st.dictionaries(keys, values, max_size=3), values, values)
def test_any_sections_are_refused_or_taken(recipe, options, calibration, evaluation):
    sections = {"options": options, "calibration": calibration, "evaluation": evaluation}
    recipe.write_text(yaml.safe_dump(sections), encoding="utf-8")
    is_refused_or_taken(str(recipe), {})


@given(st.binary(max_size=60))
def test_any_bytes_as_recipe_are_refused_or_taken(recipe, data):
    recipe.write_bytes(data)
    is_refused_or_taken(str(recipe), {})


@given(st.text(alphabet="model: slicet{}[]&*!|>-?#%@`'\"\n\t0123456789.:,_", max_size=60))
def test_any_punctuation_as_recipe_is_refused_or_taken(recipe, text):
    recipe.write_text(text)
    is_refused_or_taken(str(recipe), {})


@given(st.dictionaries(st.sampled_from(["calibration.source", "options.round_to", "options.x",
                                        "seed", "slice", "a.b.c", ""]) | st.text(max_size=5),
                       scalars | st.text(max_size=5)))  # fmt: skip
def test_any_words_of_the_command_line_are_refused_or_taken(overrides):
    is_refused_or_taken(None, overrides)
