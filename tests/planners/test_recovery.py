"""How much of a model is the compressed one, in steps that replace its layers by the teacher's."""

import pytest

from planners.recovery import Place, Recovery


def recovery(**more):
    given = {"mode": "global", "steps": 8, "batch": 4, "parts": 2, "rates": (0.01,), "held_out": 1}
    return Recovery(**{**given, **more})


def drawn(how, *, steps, layers=range(6)):
    places = [Place(trial=-1, step=step, steps=steps) for step in range(steps)]
    return [how.compressed_layers(place, list(layers)) for place in places]


def test_the_share_of_compressed_layers_rises_to_all_in_the_first_half():
    shares = {
        replace: [recovery(replace=replace).compressed_share(step, 8) for step in range(8)]
        for replace in ("none", "linear", "constant")
    }
    assert shares["none"] == [1.0] * 8
    assert shares["constant"] == [0.5] * 4 + [1.0] * 4
    assert shares["linear"] == pytest.approx([0.3, 0.475, 0.65, 0.825] + [1.0] * 4)
    assert recovery(replace="linear").compressed_share(0, 1) == 1.0


@pytest.mark.parametrize("replace", ["linear", "constant"])
def test_some_layer_is_compressed_in_each_step_and_all_are_in_the_second_half(replace):
    for layers in ([3], [1, 4], range(12)):
        found = drawn(recovery(replace=replace), steps=40, layers=layers)
        assert all(found)
        assert found[20:] == [list(layers)] * 20
        assert min(map(len, found)) < len(found[-1]) or len(found[-1]) == 1


def test_as_many_layers_are_drawn_as_the_share_says():
    found = drawn(recovery(replace="constant"), steps=400, layers=range(10))[:200]
    assert sum(map(len, found)) / 2000 == pytest.approx(0.5, abs=0.03)


def test_layers_are_drawn_from_seed_step_and_layer_alone():
    how = recovery(replace="constant", seed=3)
    first = drawn(how, steps=40)
    assert first == drawn(recovery(replace="constant", seed=3, parts=4, batch=8), steps=40)
    assert first != drawn(recovery(replace="constant", seed=4), steps=40)
    assert len({tuple(each) for each in first[:20]}) > 5
    fewer = drawn(how, steps=40, layers=(1, 3, 5))
    for all_, some in zip(first, fewer, strict=True):  # but for a layer that must be one
        assert {1, 3, 5} & set(all_) <= set(some)


def test_nothing_is_drawn_where_the_cut_changed_nothing():
    assert recovery(replace="linear").compressed_layers(Place(trial=0, step=0, steps=8), []) == []
