"""Steps: relative rates, and a state that resumes bit for bit."""

import pytest
import torch
from torch import nn

from actors.training.steps import MOMENTS, Steps
from actors.training.trained import Tensors
from planners.recovery import MEASURES, Recovery


def recovery(**more):
    given = {"mode": "global", "steps": 32, "batch": 8, "parts": 2, "rates": (0.01,), "held_out": 2}
    return Recovery(**{**given, **more})


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def steps_of(module, **more):
    how = recovery(**more)
    names = [name for name, _ in module.named_parameters()]
    trained = Tensors(module, names, how)
    return Steps(trained.parameters, trained.units, how), trained


def gradients(trained, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator) for each in trained.parameters.values()]


def values(trained):
    return {name: each.detach().clone() for name, each in trained.parameters.items()}


def test_a_step_is_relative_to_the_size_of_each_tensor():
    module = network()
    module[0].weight.data *= 100
    steps, trained = steps_of(module)
    before = values(trained)
    steps.step(gradients(trained, 1), 0.01)
    for name, each in trained.parameters.items():
        size = before[name].square().mean().sqrt()
        change = (each.detach() - before[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.01 * float(size)), rtol=1e-3,
                                   atol=1e-7)  # fmt: skip


def test_absolute_rates_are_the_same_for_all():
    steps, trained = steps_of(network(), relative=False)
    before = values(trained)
    steps.step(gradients(trained, 1), 0.01)
    for name, each in trained.parameters.items():
        change = (each.detach() - before[name]).abs()
        torch.testing.assert_close(change, torch.full_like(change, 0.01), rtol=1e-3, atol=1e-7)


def test_a_tensor_of_zeros_is_trained_at_the_size_of_its_weight():
    module = network()
    module[1].bias.data.zero_()
    _, trained = steps_of(module)
    assert trained.units["1.bias"] == trained.units["1.weight"] > 0


def test_weight_decay_does_not_depend_on_the_size():
    module = network()
    module[0].weight.data *= 100
    steps, trained = steps_of(module, weight_decay=0.5)
    before = values(trained)
    steps.step([torch.zeros_like(each) for each in trained.parameters.values()], 0.1)
    for name, each in trained.parameters.items():
        torch.testing.assert_close(each.detach(), 0.95 * before[name])


def test_the_gradient_of_all_tensors_is_clipped_as_one():
    steps, trained = steps_of(network(), clip=1.0)
    given = gradients(trained, 1)
    steps.step(given, 0.01)
    norm = sum(float(each.square().sum()) for each in given) ** 0.5
    assert norm == pytest.approx(1)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_a_restored_state_goes_on_bit_for_bit(taken):
    steps, trained = steps_of(network(), weight_decay=0.1)
    other, again = steps_of(network(), weight_decay=0.1)
    for seed in range(taken):
        steps.step(gradients(trained, seed), 0.01)
    steps.keep()
    stored = {name: each.clone() for name, each in steps.tensors().items()}
    other.restore(stored)
    for seed in range(10, 14):
        steps.step(gradients(trained, seed), 0.02)
        other.step(gradients(again, seed), 0.02)
    for each, state in ((trained, steps), (again, other)):
        assert not torch.equal(values(each)["0.weight"], state.tensors()["best/0.weight"])
    assert all(torch.equal(each, other.tensors()[n]) for n, each in steps.tensors().items())


def test_a_tensor_without_a_gradient_stays_with_its_moments_and_resumes_bit_for_bit():
    steps, trained = steps_of(network(), weight_decay=0.1, clip=1.0)
    other, again = steps_of(network(), weight_decay=0.1, clip=1.0)

    def some(seed, *absent):
        pairs = zip(trained.parameters, gradients(trained, seed), strict=True)
        return [None if name in absent else each for name, each in pairs]

    steps.step(some(1, "1.bias"), 0.01)
    before = {name: each.clone() for name, each in steps.tensors().items()}
    assert "exp_avg/1.bias" not in before
    other.restore({name: each.clone() for name, each in before.items()})
    steps.step(some(2, "1.bias", "0.weight"), 0.01)
    after = steps.tensors()
    for name in ("weight/1.bias", *(f"{kind}0.weight" for kind in ("weight/", *MOMENTS))):
        assert torch.equal(after[name], before[name])
    assert not torch.equal(after["weight/0.bias"], before["weight/0.bias"])
    other.step(some(2, "1.bias", "0.weight"), 0.01)
    for each, state in ((trained, steps), (again, other)):
        state.step(gradients(each, 3), 0.01)
    assert all(torch.equal(each, other.tensors()[n]) for n, each in steps.tensors().items())


def test_returning_to_the_best_forgets_gradients():
    steps, trained = steps_of(network())
    start = values(trained)
    steps.step(gradients(trained, 1), 0.01)
    steps.return_to_best()
    assert all(torch.equal(each, start[name]) for name, each in values(trained).items())
    assert not any(name.startswith("exp_avg") for name in steps.tensors())


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("length", [1, 2, 5, 32, 100])
def test_rates_rise_linearly_and_then_fall(schedule, length):
    how = recovery(schedule=schedule, warmup=8)
    factors = [how.factor(step, length) for step in range(length)]
    top = min(8, length // 2)
    assert max(factors) == 1
    assert factors[:top] == sorted(factors[:top])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert all(factor > 0 for factor in factors)


@pytest.mark.parametrize("length", [1, 3, 8, 32, 33, 100])
def test_the_held_out_loss_is_measured_a_few_times_and_at_the_end(length):
    how = recovery(steps=length)
    measured = [taken for taken in range(1, length + 1) if how.is_measured(taken)]
    assert measured[-1] == length
    assert len(measured) == min(length, MEASURES)


def test_trials_of_all_rates_stand_before_the_training():
    how = recovery(rates=(0.1, 0.01))
    places = [how.place(step) for step in range(how.all_steps)]
    assert [p.trial for p in places] == [0] * 8 + [1] * 8 + [-1] * 32
    assert [p.step for p in places] == [*range(8), *range(8), *range(32)]
    assert all(p.step < p.steps for p in places)
    assert recovery().place(0).trial == -1
