"""Adapters: what is merged is what was trained, and dropout is drawn from step and part."""

import torch
from torch import nn

from actors.training.adapters import FIRST, SECOND, Adapters
from actors.training.trained import linears_of, rms
from planners.recovery import Recovery


def recovery(**more):
    given = {"mode": "global", "trains": "lora", "steps": 1, "batch": 1, "parts": 1,
             "rates": (0.01,), "held_out": 1, "rank": 3}  # fmt: skip
    return Recovery(**{**given, **more})


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5, bias=False))


def inputs():
    return torch.randn(10, 8, generator=torch.Generator().manual_seed(1))


def changed(adapters):
    """Give the factors B values, as training would."""
    for name, parameter in adapters.parameters.items():
        if name.endswith(SECOND):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            parameter.data.copy_(0.1 * drawn)


def test_untrained_adapters_change_nothing():
    plain, adapted = network(), network()
    adapters = Adapters(linears_of(adapted), recovery())
    assert torch.equal(adapted(inputs()), plain(inputs()))
    results = adapters.results()
    assert results.keys() == {"0.weight", "2.weight"}
    assert all(torch.equal(each, plain.get_parameter(name)) for name, each in results.items())


def test_merged_weights_compute_what_the_adapters_do():
    adapted, merged = network(), network()
    adapters = Adapters(linears_of(adapted), recovery(alpha=7.0))
    changed(adapters)
    for name, each in adapters.results().items():
        merged.get_parameter(name).data.copy_(each)
    torch.testing.assert_close(adapted(inputs()), merged(inputs()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(merged(inputs()), network()(inputs()), atol=1e-3)


def test_factors_are_drawn_from_seed_and_name():
    def firsts(seed):
        adapters = Adapters(linears_of(network()), recovery(seed=seed))
        return {n: each for n, each in adapters.parameters.items() if n.endswith(FIRST)}

    one, same, other = firsts(1), firsts(1), firsts(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


def test_dropout_follows_from_step_and_part_alone():
    adapted = network()
    adapters = Adapters(linears_of(adapted), recovery(dropout=0.5))
    changed(adapters)

    def output(step, part):
        adapters.begin_part(step, part)
        found = adapted(inputs())
        adapters.end_part()
        return found

    first = output(4, 1)
    whole = adapted(inputs())
    assert not torch.equal(first, output(4, 0))
    assert not torch.equal(first, output(5, 1))
    assert torch.equal(first, output(4, 1))
    assert not torch.equal(first, whole)
    assert torch.equal(whole, adapted(inputs()))


def test_a_step_of_b_changes_a_linear_as_much_as_its_own_step_would():
    linear = nn.Linear(400, 300)
    adapters = Adapters({"only": linear}, recovery(rank=8))
    adapters.parameters["only" + SECOND].data.fill_(0.01 * adapters.units["only" + SECOND])
    change = adapters.results()["only.weight"] - linear.weight.detach()
    ratio = rms(change) / rms(linear.weight)
    assert 0.007 < ratio < 0.014
