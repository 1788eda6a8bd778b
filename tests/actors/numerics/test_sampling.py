"""Drawing tokens: of the probabilities that softmax gives them, by numbers known beforehand."""

import numpy as np
import pytest
import torch

from actors.numerics.sampling import drawn, random_bits
from planners.errors import NumericsError

DRAWS = 4000


def random_logits(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_as_frequent_as_softmax_says(dtype):
    row = random_logits(12).to(dtype)
    probabilities = row.double().softmax(-1)
    ids = drawn(row.expand(DRAWS, 12), seed=1, sequences=range(DRAWS), position=7)
    again = drawn(row.expand(DRAWS, 12), seed=1, sequences=range(DRAWS), position=8)
    for found in (ids, again):
        expected = DRAWS * probabilities
        chi_square = ((found.bincount(minlength=12) - expected) ** 2 / expected).sum()
        assert chi_square < 31.3  # 11 degrees of freedom: one in a thousand is above
    # Two positions are independent: both tokens are the same as often as by chance.
    same, chance = (ids == again).double().mean(), (probabilities**2).sum()
    assert abs(same - chance) < 4 * (chance * (1 - chance) / DRAWS) ** 0.5


def test_a_token_depends_on_its_own_row_alone():
    logits = random_logits(9, 1000)
    together = drawn(logits, seed=3, sequences=range(20, 29), position=5)
    alone = [drawn(logits[i : i + 1], seed=3, sequences=[20 + i], position=5)[0] for i in range(9)]
    assert together.tolist() == alone


def test_a_token_is_where_the_random_number_meets_the_sum_of_probabilities():
    logits = random_logits(50, 300)
    found = drawn(logits, seed=9, sequences=range(50), position=0)
    sums = logits.double().softmax(-1).cumsum(-1).numpy()
    uniform = np.array([random_bits(9, i, 0) / 2**64 for i in range(50)])
    assert found.tolist() == [
        int(np.searchsorted(s, u)) for s, u in zip(sums, uniform, strict=True)
    ]


def test_random_bits_are_the_same_on_every_machine_and_differ_in_each_number():
    assert random_bits(0, 0, 0) == 14680368682093457738
    numbers = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (12, 2, 3), (1, 22, 3), (1, 2, 23)]
    assert len({random_bits(*each) for each in numbers}) == len(numbers)


def test_what_has_no_probability_is_never_drawn():
    row = torch.tensor([float("-inf"), 0.0, -50.0, float("-inf"), 0.0, float("-inf")])
    found = drawn(row.expand(DRAWS, 6), seed=0, sequences=range(DRAWS), position=0)
    assert set(found.tolist()) == {1, 4}


@pytest.mark.parametrize("broken", [[float("nan"), 0.0], [float("inf"), 0.0], [float("-inf")] * 2])
def test_logits_that_are_not_finite_are_refused_and_their_sequence_is_named(broken):
    logits = torch.tensor([[0.0, 1.0], broken])
    with pytest.raises(NumericsError, match="token 5 of sequence 41 are not finite"):
        drawn(logits, seed=0, sequences=range(40, 42), position=5)
