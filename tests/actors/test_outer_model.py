"""A model with its layers taken out, against the same model whole."""

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from actors.modeling.outer_model import OuterModel
from actors.storage.checkpoint import Checkpoint
from planners import families
from tests.builders import LENGTH, VOCABULARY, compress_local, save_model

FAMILY = families.load("llama")


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
