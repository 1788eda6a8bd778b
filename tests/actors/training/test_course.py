"""Courses: how rates are chosen, what is kept, and what ends a training."""

import math

import pytest
import torch
from torch import nn

from actors.training.course import Course, follow
from actors.training.group import Alone
from actors.training.lessons import Lessons, samples
from actors.training.steps import Steps
from actors.training.trained import Tensors
from planners.errors import ConfigError, NumericsError
from planners.recovery import RISING_STEPS, Recovery

WIDTH, LENGTH, SEQUENCES = 6, 5, 20


def recovery(**more):
    given = {"mode": "local", "trains": "all", "steps": 16, "batch": 4, "parts": 2,
             "rates": (0.03,), "held_out": 3}  # fmt: skip
    return Recovery(**{**given, **more})


class Fit:
    """A linear that learns another one, to within some noise; ``spoil`` changes each loss."""

    def __init__(self, how, *, spoil=lambda loss: loss):
        generator = torch.Generator().manual_seed(1)
        self.how, self.spoil, self.terms = how, spoil, LENGTH
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        weight = torch.randn(WIDTH, WIDTH, generator=generator)
        self.linear.weight.data.copy_(weight)
        self.x = torch.randn(SEQUENCES, LENGTH, WIDTH, generator=generator)
        wanted = weight + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator)
        noise = 0.3 * torch.randn(self.x.shape, generator=generator)
        self.targets = self.x @ wanted.T + noise
        self.trained = Tensors(self.linear, ["weight"], how)
        self.steps = Steps(self.trained.parameters, self.trained.units, how)

    def loss(self, rows):
        rows = list(rows)
        return (self.linear(self.x[rows]) - self.targets[rows]).square().sum().double().detach()

    def backward(self, rows, scale):
        loss = (self.linear(self.x[rows]) - self.targets[rows]).square().sum()
        (loss * scale).backward()
        return torch.tensor(self.spoil(float(loss.detach())), dtype=torch.float64)

    def follow(self, *, pauses=lambda: False):
        course = Course()
        lessons = Lessons(self, self.trained, self.how, Alone(), num_sequences=SEQUENCES)
        return course, follow(course, self.steps, lessons, self.how, pauses=pauses)


def test_the_best_weights_on_held_out_data_are_left():
    fit = Fit(recovery())
    course, finished = fit.follow()
    assert finished
    assert course.best["loss"] == min(each["loss"] for each in course.held_out)
    assert course.best["loss"] < course.held_out[0]["loss"]
    assert float(fit.loss(range(17, 20))) / (3 * LENGTH) == pytest.approx(course.best["loss"])


def test_what_only_gets_worse_stays_as_it_was():
    fit = Fit(recovery(rates=(3.0,)))
    before = fit.linear.weight.detach().clone()
    course, _ = fit.follow()
    assert course.best == {"step": 0, "loss": course.held_out[0]["loss"]}
    assert torch.equal(fit.linear.weight, before)


def test_the_rate_of_the_best_trial_trains_from_the_start():
    two, one = Fit(recovery(rates=(3.0, 0.03))), Fit(recovery())
    course, _ = two.follow()
    one.follow()
    assert course.chosen == 0.03
    assert [each["rate"] for each in course.trials] == [3.0, 0.03]
    assert course.trials[1]["loss"] < course.trials[0]["loss"]
    assert torch.equal(two.linear.weight, one.linear.weight)


def test_rates_below_one_that_is_worse_are_not_tried():
    three, two = Fit(recovery(rates=(3.0, 0.03, 1e-5, 1e-6))), Fit(recovery(rates=(3.0, 0.03)))
    course, finished = three.follow()
    two.follow()
    assert finished
    assert [each["rate"] for each in course.trials] == [3.0, 0.03, 1e-5]
    assert course.chosen == 0.03
    assert len(course.history) == 3 * 4 + 16
    assert torch.equal(three.linear.weight, two.linear.weight)


def test_a_loss_that_is_no_number_ends_a_training_with_advice():
    losses = iter([1.0] * 4 + [math.nan] * 2)  # of the two parts of each step
    with pytest.raises(NumericsError, match=r"the loss is nan at step 3 of 16, rate 0\.03") as got:
        Fit(recovery(), spoil=lambda _: next(losses)).follow()
    assert got.value.hint == "use a smaller rate, such as 0.003"


def test_a_loss_far_above_the_start_ends_a_training():
    with pytest.raises(NumericsError, match=f"for {RISING_STEPS} steps"):
        Fit(recovery(steps=40, mode="global"), spoil=lambda _: 1e6).follow()


def test_a_layer_whose_loss_is_far_above_the_start_keeps_what_it_has():
    course, finished = Fit(recovery(steps=40, mode="local"), spoil=lambda _: 1e6).follow()
    assert finished
    assert len(course.history) == RISING_STEPS


def test_a_trial_without_a_loss_only_loses():
    losses = iter([math.nan] * 2 + [1.0] * 100)
    fit = Fit(recovery(rates=(0.3, 0.03)), spoil=lambda _: next(losses))
    course, finished = fit.follow()
    assert finished
    assert course.trials[0] == {"rate": 0.3, "loss": None}
    assert course.chosen == 0.03


def test_where_every_trial_fails_so_does_the_training():
    with pytest.raises(NumericsError, match="at every rate"):
        Fit(recovery(rates=(0.3, 0.03)), spoil=lambda _: math.nan).follow()


def test_each_epoch_has_every_sequence_once_in_another_order():
    drawn = [each for step in range(6) for each in samples(step, batch=5, num_sequences=15, seed=2)]
    assert sorted(drawn[:15]) == sorted(drawn[15:]) == list(range(15))
    assert drawn[:15] != drawn[15:]


def test_a_batch_may_span_epochs():
    stream = [each for step in range(9) for each in samples(step, batch=5, num_sequences=3, seed=2)]
    assert all(sorted(stream[at : at + 3]) == [0, 1, 2] for at in range(0, 45, 3))


def test_the_number_of_parts_does_not_change_what_is_learnt():
    weights = []
    for parts in (1, 2, 4):
        fit = Fit(recovery(parts=parts))
        fit.follow()
        weights.append(fit.linear.weight.detach())
    for each in weights[1:]:
        torch.testing.assert_close(each, weights[0], rtol=1e-4, atol=1e-5)


def test_workers_must_divide_the_parts():
    class Three(Alone):
        size = 3

    fit = Fit(recovery())
    with pytest.raises(ConfigError, match="the 2 parts of a batch cannot be divided by 3 workers"):
        Lessons(fit, fit.trained, fit.how, Three(), num_sequences=SEQUENCES)
