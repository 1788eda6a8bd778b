"""Whole models: logits of any tokens are the model's own, and losses do not depend on chunks."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.storage.checkpoint import Checkpoint
from actors.training import distillation
from actors.training.distillation import Distillation
from actors.training.whole_model import WholeModel
from tests.builders import LENGTH, VOCABULARY, save_model

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.25, "use_qk_norm": False},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
}
ROWS = [2, 0, 5]


def ids():
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (6, LENGTH), generator=drawn)


def loaded(folder):
    return WholeModel(Checkpoint(str(folder)), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return a teacher."""
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=True, seed=5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_of_some_tokens_are_the_models_own(tmp_path, model_type):
    folder = save_model(tmp_path, model_type=model_type, **FAMILIES[model_type])
    model = loaded(folder)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(ids()).logits
        hidden = model.hidden(ids())
        found = torch.cat([model.logits(chunk) for chunk in hidden.flatten(0, 1).split(50)])
        assert torch.equal(model.module(ids()).logits.flatten(0, 1).argmax(-1), found.argmax(-1))
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_the_embedding(llama):
    module = loaded(llama).module
    assert module.get_output_embeddings().weight is module.get_input_embeddings().weight
    assert not any(each.requires_grad for each in module.parameters())


def reference(student, teacher):
    """Return loss and gradients of the first layer, by autograd on whole logits in float64."""
    module, other = student.module.double(), teacher.module.double()
    with torch.no_grad():
        p = other(ids()[ROWS]).logits.softmax(-1)
    log_q = module(ids()[ROWS]).logits.log_softmax(-1)
    loss = (p * (p.log() - log_q)).sum()
    (loss * 0.5).backward()
    return float(loss.detach()), gradients(student)


def gradients(student):
    layer = student.layers["model.layers.0."]
    return {name: each.grad.float() for name, each in layer.named_parameters()}


def trainable(folder):
    model = loaded(folder)
    for each in model.layers["model.layers.0."].parameters():
        each.requires_grad_()
    return model


@pytest.mark.parametrize("chunk", [1000, 7])
def test_divergence_and_gradient_are_those_of_whole_logits(llama, other, monkeypatch, chunk):
    monkeypatch.setattr(distillation, "LOGIT_TOKENS", chunk)
    expected, exact = reference(trainable(llama), loaded(other))
    student = trainable(llama)
    source = Distillation(student, loaded(other), ids())
    assert float(source.backward(ROWS, 0.5)) == pytest.approx(expected, rel=1e-5)
    assert float(source.loss(ROWS)) == pytest.approx(expected, rel=1e-5)
    found = gradients(student)
    for name, each in exact.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-4)


def test_without_a_teacher_the_text_is_learnt(llama):
    student = trainable(llama)
    source = Distillation(student, None, ids())
    logits = student.module(ids()[ROWS]).logits[:, :-1].flatten(0, 1).double()
    expected = torch.nn.functional.cross_entropy(
        logits, ids()[ROWS][:, 1:].flatten(), reduction="sum"
    )
    assert source.terms == LENGTH - 1
    assert float(source.backward(ROWS, 1.0)) == pytest.approx(float(expected.detach()), rel=1e-5)
