"""Single layers: they learn their targets, and a training that was stopped can be resumed."""

import pytest
import torch
from torch import nn

from actors.storage.files import Directory
from actors.training.checkpoints import Checkpoints
from actors.training.local import LayerData, train_layer
from actors.training.resume import Durability
from planners.recovery import Recovery

WIDTH, LENGTH, SEQUENCES = 8, 6, 24


def recovery(**more):
    given = {"mode": "local", "trains": "made", "steps": 12, "batch": 4, "parts": 2,
             "rates": (0.03, 0.003), "held_out": 4}  # fmt: skip
    return Recovery(**{**given, **more})


def dense_layer():
    torch.manual_seed(2)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def cut_layer():
    """Return the layer with another second linear."""
    layer = dense_layer()
    layer[3].weight.data += 0.1 * torch.randn(
        layer[3].weight.shape, generator=torch.Generator().manual_seed(4)
    )
    return layer


def data_for(layer):
    x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        y = dense_layer()(x)
    return LayerData(
        forward=layer,
        inputs=lambda rows: x[list(rows)],
        targets=lambda rows: y[list(rows)],
        num_sequences=SEQUENCES,
        length=LENGTH,
    )


def train(folder, how=None, *, layer=None, save_every=0, stops=lambda: False):
    layer = layer or cut_layer()
    checkpoints = Checkpoints(Directory(str(folder)), "recover-layer-00000", "f")
    durability = Durability(checkpoints=checkpoints, save_every=save_every, stops=stops)
    dense = dense_layer().state_dict()
    return train_layer(layer, dense, data_for(layer), how or recovery(), durability)


def test_what_was_made_and_the_norms_learn_the_dense_outputs(tmp_path):
    course, weights = train(tmp_path)
    assert weights.keys() == {"3.weight", "0.weight", "0.bias"}
    assert course.best["loss"] < 0.5 * course.held_out[0]["loss"]
    assert not list(tmp_path.iterdir())  # no checkpoint was asked for


def test_a_layer_that_nothing_was_made_of_is_left_alone(tmp_path):
    course, weights = train(tmp_path, layer=dense_layer())
    assert not weights
    assert not course.history


def test_adapters_leave_merged_weights_of_linears(tmp_path):
    course, weights = train(tmp_path, recovery(trains="lora", rank=4))
    assert weights.keys() == {"1.weight", "3.weight"}
    assert course.best["loss"] < course.held_out[0]["loss"]


@pytest.mark.parametrize("after", [1, 3, 4, 6, 7, 17])
def test_a_training_that_was_stopped_resumes_to_the_same_bits(tmp_path, after):
    _, expected = train(tmp_path / "whole")
    left = iter(range(1, 100))
    _, nothing = train(tmp_path / "cut", stops=lambda: next(left) == after)
    assert nothing == {}
    course, found = train(tmp_path / "cut")
    assert len(course.history) == recovery().all_steps
    assert all(torch.equal(each, expected[name]) for name, each in found.items())
