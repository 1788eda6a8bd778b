"""What a family file reads from a config is what transformers builds from it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from planners.errors import ModelError
from planners.families import family_of
from planners.model.cost import dense_parameters
from tests.families.tiny import BIASED, MODEL_TYPES, SIZES, config_of, shape_of

REQUIRED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "ffn_dim",
    "vocab_size",
    "num_key_value_heads",  # where those of transformers are no divisor of the heads
    "head_dim",  # where the heads must have the width of the model
)


def stored_of(config):
    """Return name -> shape of the tensors of a stock model."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del stored[family_of(config.model_type).head]
    return stored


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_tensor_is_named_once_with_its_shape(model_type, tied):
    config = config_of(model_type, tied=tied)
    family, shape = shape_of(config)
    named = [*family.outer_tensors(shape).values()]
    for layer in range(shape.num_layers):
        named += family.layer_tensors(shape, layer).values()
    assert len(dict(named)) == len(named)
    stored = stored_of(config)
    assert dict(named) == stored
    assert dense_parameters(shape) == sum(torch.Size(dims).numel() for dims in stored.values())


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_key_that_is_absent_has_the_default_of_transformers(model_type):
    fields = type(AutoConfig.for_model(model_type)).__dataclass_fields__
    for key, value in family_of(model_type).defaults[model_type].items():
        if key in fields:
            assert fields[key].default == value, key


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_that_lacks_a_key_is_read_as_transformers_reads_it_or_refused(model_type):
    whole = config_of(model_type).to_dict()
    read = family_of(model_type).shape_of
    read_keys = {*SIZES, *BIASED, *family_of(model_type).defaults[model_type], *REQUIRED}
    for key in whole.keys() & read_keys - {"pad_token_id"}:
        less = {k: v for k, v in whole.items() if k != key}
        try:
            shape, config = read(less, "float32"), AutoConfig.for_model(**less)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        except (ModelError, TypeError, ValueError):  # transformers too refuses some
            assert key in REQUIRED
            continue
        assert dense_parameters(shape) == sum(p.numel() for p in model.parameters()), key
        assert shape.tied == config.tie_word_embeddings
