"""A model with its layers taken out, against the same model whole."""

import gc
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from actors.modeling.halves import HalvedLayer
from actors.modeling.outer_model import OuterModel
from actors.storage.checkpoint import Checkpoint
from planners import families
from planners.families._base import Family
from planners.model.form import dense_form
from tests.builders import LENGTH, VOCABULARY, compress_local, save_model
from tests.families.tiny import MODEL_TYPES, SIZES, config_of, ids_of, model_of

FAMILY = families.load("llama")
FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED = {"starcoder2": {"sliding_window": 5}, "ministral": {"sliding_window": 5}}
# A type that has no family file yet, but whose layers take their cache under a name of its own.
GPT_NEOX = replace(
    FAMILY,
    layer="gpt_neox.layers.{i}",
    embedding="gpt_neox.embed_in.weight",
    final_norm="gpt_neox.final_layer_norm.weight",
)


@pytest.fixture(scope="module", params=["own head", "tied", "sliced", "sliced, tied"])
def model(request, tmp_path_factory):
    """Return a model; the residual stream of a sliced one is narrower than its layers read."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, tie_word_embeddings="tied" in request.param)
    if "sliced" not in request.param:
        return folder
    compress_local(folder, folder / "run", method="slicegpt", keep_fraction=0.8)
    return folder / "run" / "model"


def token_ids():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (3, LENGTH), generator=generator)


def opened(folder):
    """Return the outer model, with embedding and head, and the layers that were taken out."""
    checkpoint = Checkpoint(str(folder))
    outer = OuterModel(checkpoint.config, FAMILY, dtype=torch.float32, device="cpu")
    outer.read_embedding(checkpoint)
    outer.read_head(checkpoint)
    layers = [
        outer.layer(i, checkpoint.read_prefix(FAMILY.layer.format(i=i) + "."))
        for i in range(checkpoint.shape.num_layers)
    ]
    return outer, layers


def whole(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True
    ).eval()


@torch.inference_mode()
def test_layer_by_layer_the_logits_and_the_loss_are_those_of_the_whole_model(model):
    outer, layers = opened(model)
    ids = token_ids()
    hidden = outer.embed(ids)
    arguments = outer.layer_arguments(hidden)
    for layer, given in zip(layers, arguments, strict=True):
        hidden = layer(hidden, **given)
    expected = whole(model)(ids, labels=ids)
    assert torch.allclose(outer.logits(hidden), expected.logits, atol=1e-5)
    nats, num_predicted = outer.loss(hidden, ids)
    assert num_predicted == ids[:, 1:].numel()
    assert nats / num_predicted == pytest.approx(float(expected.loss), rel=1e-5)


@torch.inference_mode()
def test_tokens_that_come_later_begin_at_the_position_that_is_given(model):
    outer, layers = opened(model)
    ids, cache, found = token_ids(), DynamicCache(), []
    for start in range(LENGTH):
        hidden = outer.embed(ids[:, start : start + 1], start=start)
        arguments = outer.layer_arguments(hidden, start=start, cache=cache)
        for layer, given in zip(layers, arguments, strict=True):
            hidden = layer(hidden, **given)
        found.append(outer.logits(hidden))
    assert torch.allclose(torch.cat(found, dim=1), whole(model)(ids).logits, atol=1e-4)


def test_a_tied_table_is_held_once_and_a_head_of_its_own_beside_it(tmp_path):
    for tied, count in ((True, 2), (False, 3)):
        folder = save_model(tmp_path / str(tied), tie_word_embeddings=tied)
        assert len(opened(folder)[0].tensors()) == count  # with the norm's scale


def test_the_weights_of_a_layer_live_as_long_as_whoever_took_it_out(tmp_path):
    outer, layers = opened(save_model(tmp_path / "model"))
    held = weakref.ref(layers[0].self_attn.q_proj.weight)
    assert held() is not None
    del layers
    gc.collect()
    assert held() is None
    assert outer.tensors()


@dataclass(frozen=True)
class Held:
    """Tensors in memory, in place of a checkpoint."""

    tensors: dict[str, Tensor]

    @property
    def names(self):
        return self.tensors.keys()

    def read(self, name):
        return self.tensors[name]

    def stream_prefix(self, prefix):
        return [
            (n.removeprefix(prefix), t) for n, t in self.tensors.items() if n.startswith(prefix)
        ]


@dataclass(frozen=True)
class Specimen:
    """A model of transformers, and what a checkpoint of it holds."""

    stock: Any
    family: Family
    weights: Held

    def outer(self):
        config = self.stock.config.to_dict()
        return OuterModel(config, self.family, dtype=self.stock.dtype, device="cpu")

    def opened(self):
        """Return the outer model, with embedding and head, and the layers that were taken out."""
        outer = self.outer()
        outer.read_embedding(self.weights)
        outer.read_head(self.weights)
        count = self.stock.config.num_hidden_layers
        prefixes = [self.family.layer.format(i=i) + "." for i in range(count)]
        return outer, [
            outer.layer(i, self.weights.stream_prefix(prefix)) for i, prefix in enumerate(prefixes)
        ]


def specimen(model_type, *, tied=False, dtype=torch.float32, **changes):
    config = config_of(model_type, tied=tied, **WINDOWED.get(model_type, {}), **changes)
    stock = model_of(config, dtype=dtype)
    family = GPT_NEOX if model_type == "gpt_neox" else families.family_of(model_type)
    weights = stock.state_dict()
    if tied:
        del weights[family.head]
    return Specimen(stock, family, Held(weights))


@pytest.fixture(scope="module", params=[*MODEL_TYPES, "gpt_neox"])
def untied(request):
    return specimen(request.param)


@pytest.fixture(scope="module", params=[*MODEL_TYPES, "gpt_neox"])
def tied(request):
    return specimen(request.param, tied=True, dtype=torch.float64)


@torch.inference_mode()
def check_streamed(model):
    outer, layers = model.opened()
    ids = ids_of()
    hidden = outer.embed(ids)
    for layer, given in zip(layers, outer.layer_arguments(hidden), strict=True):
        hidden = layer(hidden, **given)
    expected = model.stock(ids, labels=ids, use_cache=False)
    assert torch.equal(outer.logits(hidden), expected.logits)
    nats, num_predicted = outer.loss(hidden, ids)
    assert nats / num_predicted == pytest.approx(float(expected.loss), rel=1e-6)


@torch.inference_mode()
def check_generated(model):
    outer, layers = model.opened()
    ids = ids_of()
    ours, theirs = DynamicCache(), DynamicCache()
    whole = model.stock(ids, use_cache=False).logits
    parts = [(0, 6), *((start, start + 1) for start in range(6, ids.shape[1]))]
    for first, last in parts:
        hidden = outer.embed(ids[:, first:last], start=first)
        arguments = outer.layer_arguments(hidden, start=first, cache=ours)
        for layer, given in zip(layers, arguments, strict=True):
            hidden = layer(hidden, **given)
        found = outer.logits(hidden)
        expected = model.stock(ids[:, first:last], past_key_values=theirs, use_cache=True).logits
        assert torch.equal(found, expected)
        assert torch.equal(found.argmax(-1), whole[:, first:last].argmax(-1))


def test_streamed_logits_are_bit_for_bit_those_of_the_stock_model(untied):
    check_streamed(untied)


def test_streamed_logits_of_a_tied_model_are_bit_for_bit_those_of_the_stock_model(tied):
    check_streamed(tied)


def test_generation_token_by_token_is_bit_for_bit_that_of_the_stock_model(untied):
    check_generated(untied)


def test_generation_of_a_tied_model_is_bit_for_bit_that_of_the_stock_model(tied):
    check_generated(tied)


def test_arguments_of_the_layers_do_not_wait_for_tables_and_take_no_memory_of_theirs(untied):
    outer = untied.outer()
    ids = ids_of()
    before = outer.layer_arguments(torch.zeros(*ids.shape, SIZES["hidden_size"]))
    assert not outer.tensors()
    outer.read_embedding(untied.weights)
    after = outer.layer_arguments(outer.embed(ids))
    for one, other in zip(before, after, strict=True):
        assert one.keys() == other.keys()
        assert one["attention_mask"] is None or torch.equal(
            one["attention_mask"], other["attention_mask"]
        )


@pytest.mark.parametrize(("tokens", "masked"), [(4, False), (12, True)])
def test_masks_are_made_once_and_only_where_a_window_is_shorter_than_the_sequences(tokens, masked):
    outer = specimen("mistral").outer()
    first, *_, last = outer.layer_arguments(torch.zeros(2, tokens, SIZES["hidden_size"]))
    assert (first["attention_mask"] is not None) == masked
    assert first["attention_mask"] is last["attention_mask"]
    assert first["position_embeddings"] is last["position_embeddings"]


@torch.inference_mode()
@pytest.mark.parametrize("index", [0, 1])
def test_half_a_layer_attends_within_the_window_of_its_layer(index):
    model = specimen("qwen2", layer_types=[FULL, SLIDING])
    outer, layers = model.opened()
    hidden = outer.embed(ids_of())
    shape = FAMILY.shape_of(model.stock.config.to_dict(), "float32")
    tensors = dict(model.weights.stream_prefix(FAMILY.layer.format(i=index) + "."))
    half = HalvedLayer(
        tensors,
        dense_form(shape),
        model.stock.config.to_dict(),
        index=index,
        shape=shape,
        dtype=torch.float32,
        device="cpu",
    )
    expected = layers[index](hidden, **outer.layer_arguments(hidden)[index])
    assert torch.allclose(half.output(hidden), expected, atol=1e-6)
    other = layers[index](hidden, **outer.layer_arguments(hidden)[1 - index])
    assert not torch.allclose(half.output(hidden), other, atol=1e-3)
