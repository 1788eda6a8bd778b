"""Losses: their sums and gradients are those of autograd in float64, and add up over tokens."""

import pytest
import torch

from actors.training.losses import cross_entropy, divergence, squared_error

TOKENS, VOCABULARY = 24, 37


def logits(seed, *, width=VOCABULARY):
    drawn = torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed))
    return 3 * drawn


def labels():
    return torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(9))


def reference_divergence(student, teacher):
    p, q = teacher.softmax(-1), student.softmax(-1)
    return (p * (p.log() - q.log())).sum()


def reference_cross_entropy(student, targets):
    return -student.softmax(-1).log()[torch.arange(TOKENS), targets].sum()


def reference_squared_error(output, target):
    return ((output - target).square().sum(-1) / target.square().sum(-1)).sum()


LOSSES = {
    "divergence": (divergence, reference_divergence, logits(2)),
    "cross_entropy": (cross_entropy, reference_cross_entropy, labels()),
    "squared_error": (squared_error, reference_squared_error, logits(2)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sum_and_gradient_are_those_of_autograd_in_float64(name):
    loss, reference, target = LOSSES[name]
    exact = logits(1).double().requires_grad_()
    expected = reference(exact, target.double() if target.is_floating_point() else target)
    expected.backward()
    found, gradient = loss(logits(1), target)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_chunks_add_up_to_the_whole(name):
    loss, _, target = LOSSES[name]
    whole, gradient = loss(logits(1), target)
    parts = [loss(logits(1)[rows], target[rows]) for rows in (slice(0, 7), slice(7, TOKENS))]
    torch.testing.assert_close(sum(total for total, _ in parts), whole, rtol=1e-12, atol=0)
    assert torch.equal(torch.cat([each for _, each in parts]), gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_arguments_stay_as_they_are(name):
    loss, _, target = LOSSES[name]
    given, before = logits(1), target.clone()
    loss(given, target)
    assert torch.equal(given, logits(1))
    assert torch.equal(target, before)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    for loss in (divergence, squared_error):
        total, gradient = loss(logits(1), logits(1))
        assert float(total) == 0
        assert not gradient.any()
