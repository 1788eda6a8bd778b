"""The tables of phases and of kinds of units: every unit has a kind, every kind all it needs."""

import pytest

from actors import methods
from actors.layer_units.registry import FUNCTIONS
from orchestrator.recipe.method_options import resolve_options
from planners.method import Target
from planners.model.cost import dense_start
from planners.units.kinds import KINDS, PHASES, kind_of, layer_of
from planners.units.shards import shard_units
from planners.units.units import (
    carried_units,
    compression_units,
    damage_units,
    losses_units,
    refit_units,
)
from tests.planners.test_units import IDENTITY, SPEC, shape_of, units_of


def test_a_kind_that_a_worker_does_has_a_function_and_every_function_is_of_a_kind():
    assert {kind.name for kind in KINDS.values() if kind.by_worker} == FUNCTIONS.keys()


def test_every_kind_has_a_phase_and_what_a_worker_does_has_its_work():
    assert all(kind.phase in PHASES for kind in KINDS.values())
    assert all(kind.work is not None for kind in KINDS.values() if kind.by_worker)


def all_units():
    """Return a unit of each name that there is, but of those that a driver makes."""
    found = units_of()
    sums = found[:3]
    svd, shape = methods.spec("svdllm"), shape_of(3)
    options = resolve_options(svd, {"refit": True})
    form = svd.form(shape, dense_start(shape), Target(keep_fraction=0.5), options)
    made = compression_units(sums, spec=svd, options=options, form=form, num_microbatches=5)
    drafts = [unit for unit in made if unit.kind == "draft"]
    chain, chosen = refit_units(drafts)
    linears = ("q_proj",)
    asked = {"method": "slicegpt", "revision": 1, "options": resolve_options(SPEC, {})}
    layers = [unit for unit in found if unit.kind == "layer"]
    return [
        *found, *units_of(rotation="shared"), *units_of(schedule="sequential", shards=2),
        *drafts, *chain, *chosen, *damage_units(sums, **asked),
        *damage_units(sums, **asked, by="svdllm"),
        *losses_units(sums, method="svdllm", revision=1, modules=linears, form=form),
        *carried_units(IDENTITY, frozenset(), sums, layers, shape), *shard_units(sums, 1, 2),
    ]  # fmt: skip


def test_the_name_of_a_unit_says_its_kind_and_its_layer():
    shared = {"chosen": "layer", "basis_sequential": "basis"}  # a run has one or the other
    for unit in all_units():
        kind = kind_of(unit.name)
        assert kind.name == shared.get(unit.kind, unit.kind)
        assert layer_of(unit.name) == (unit.index if kind.of == "layer" else None)


@pytest.mark.parametrize(
    ("unit", "kind"),
    [
        ("evaluation-dense-part-00002", "evaluate"),
        ("evaluation-compressed-part-00002", "evaluate_compressed"),
        ("partial-shard-00001-layer-00004", "partial"),
        ("boundary-layer-00004-mb-00001", "boundary"),
        ("stitch", "stitch"),
    ],
)
def test_what_a_driver_records_has_a_kind_too(unit, kind):
    assert kind_of(unit) is KINDS[kind]


@pytest.mark.parametrize("unit", ["", "00003", "layer-layer", "step", "evaluation", "microbatch 3"])
def test_what_is_no_unit_has_no_kind(unit):
    assert kind_of(unit) is None
    assert layer_of(unit) is None
