"""The graph of units: what depends on what, and what makes a unit another one."""

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.batching import TokenBatching
from planners.method import Target
from planners.model.cost import dense_start
from planners.model.taps import Statistic, last_tap, layer_statistics
from planners.units.units import Identity, compression_units, needed, spent, statistics_units
from tests.shapes import llama_shape

SPEC = methods.spec("slicegpt")
IDENTITY = Identity(
    model_revision="model", calibration_hash="data", threads=1, device="cpu",
    batching=TokenBatching(
        sequences=20, sequence_length=8, microbatch_sequences=4, dtype="float32"
    ),
)  # fmt: skip
# How many tokens there are is in their hash.
IDENTITY_FIELDS = {*Identity.__slots__, "microbatch_sequences", "dtype", "shards"} - {"batching"}


def another_identity(field):
    """Return one that differs in a field, of its own or of its batching."""
    whole = IDENTITY if field in Identity.__slots__ else IDENTITY.batching
    old = getattr(whole, field)
    changed = replace(whole, **{field: old + 1 if isinstance(old, int) else "other"})
    return changed if whole is IDENTITY else replace(IDENTITY, batching=changed)


def shape_of(num_layers):
    return llama_shape(
        family="llama", model_type="llama", num_layers=num_layers, hidden=64, intermediate=96,
        num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=50, tied=False,
    )  # fmt: skip


def units_of(
    num_layers=3, *, identity=IDENTITY, slice_=0.25, revision=1, num_microbatches=5, **options
):
    """Return the statistics units and those of compression."""
    options = resolve_options(SPEC, options)
    form = SPEC.form(
        shape_of(num_layers), dense_start(shape_of(num_layers)), Target(slice=slice_), options
    )
    sums = statistics_units(
        identity, SPEC.statistics(shape_of(num_layers), options), shape_of(num_layers)
    )
    rest = compression_units(
        sums,
        spec=replace(SPEC, revision=revision),
        options=options,
        form=form,
        num_microbatches=num_microbatches,
    )
    return [*sums, *rest]


def fingerprints(units):
    return {unit.name: unit.fingerprint for unit in units}


ROTATIONS = st.sampled_from(("per_site", "shared"))


@given(st.integers(1, 40), ROTATIONS)
def test_a_unit_comes_after_what_it_reads(num_layers, rotation):
    seen = set()
    for unit in units_of(num_layers, rotation=rotation):
        assert set(unit.inputs) <= seen
        assert unit.name not in seen
        seen.add(unit.name)


@given(st.integers(1, 40))
def test_a_layer_reads_the_bases_of_its_three_sites_and_a_basis_one_layer(num_layers):
    units = {unit.name: unit for unit in units_of(num_layers)}
    for layer in range(num_layers):
        sites = range(2 * layer, 2 * layer + 3)
        assert units[f"layer-{layer:05d}"].inputs == tuple(f"basis-site-{s:05d}" for s in sites)
    for site in range(2 * num_layers + 1):
        owner = min(site // 2, num_layers - 1)
        assert units[f"basis-site-{site:05d}"].inputs == (f"statistics-layer-{owner:05d}",)
    assert units["embedding"].inputs == ("basis-site-00000",)
    assert units["head"].inputs == (f"basis-site-{2 * num_layers:05d}",)


@given(st.integers(1, 40))
def test_a_shared_rotation_reads_every_layer_and_is_read_by_every_layer(num_layers):
    units = {unit.name: unit for unit in units_of(num_layers, rotation="shared")}
    assert len(units["basis-shared"].inputs) == num_layers
    rest = [u for u in units.values() if u.kind in ("layer", "embedding", "head")]
    assert {unit.inputs for unit in rest} == {("basis-shared",)}


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_sequential_sites_form_a_chain_that_reads_no_statistics(num_layers, shards, microbatches):
    sequential = {"schedule": "sequential", "shards": shards}
    found = units_of(num_layers, num_microbatches=microbatches, **sequential)
    units = {unit.name: unit for unit in found}
    num_shards = min(shards, microbatches)
    sites = [f"basis-site-{s:05d}" for s in range(2 * num_layers + 1)]
    for site, name in enumerate(sites):
        streams = [f"stream-site-{site:05d}-shard-{k:05d}" for k in range(num_shards)]
        assert units[name].inputs == tuple(streams)
        for stream in streams:
            before = (sites[site - 1], stream.replace(f"site-{site:05d}", f"site-{site - 1:05d}"))
            assert units[stream].inputs == (before if site else ())
    for layer in range(num_layers):
        assert units[f"layer-{layer:05d}"].inputs == tuple(sites[2 * layer : 2 * layer + 3])
    assert not any(unit.taps for unit in units.values())
    assert {unit.kind for unit in units.values() if not unit.lasting} == {"stream"}


@given(st.data())
def test_what_is_needed_is_what_lasts_and_what_it_cannot_be_done_without(data):
    units = units_of(3, num_microbatches=4, schedule="sequential", shards=3)
    done = data.draw(st.sets(st.sampled_from(units)))
    found = needed(units, done=lambda unit: unit in done)
    names = {unit.name for unit in found}
    assert names.isdisjoint(unit.name for unit in done)
    assert names >= {unit.name for unit in units if unit.lasting and unit not in done}
    recorded = {unit.name for unit in done}
    for unit in found:
        assert set(unit.inputs) <= names | recorded
        # Nothing is streamed for its own sake.
        assert unit.lasting or any(unit.name in reader.inputs for reader in found)


def test_a_stream_is_spent_when_its_gram_is_summed_and_it_has_passed_on():
    units = units_of(1, num_microbatches=2, schedule="sequential", shards=2)
    by_name = {unit.name: unit for unit in units}
    passed = by_name["stream-site-00001-shard-00000"]
    site = by_name["basis-site-00000"]
    read = by_name["stream-site-00000-shard-00000"]
    assert spent(passed, units, done=lambda unit: unit in (passed, site, read)) == [read]
    assert spent(passed, units, done=lambda unit: unit in (passed, read)) == []
    assert spent(site, units, done=lambda unit: unit in (site, read)) == []


def test_fingerprints_of_runs_that_were_begun_earlier_are_found_again():
    wanted = SPEC.statistics(shape_of(1), resolve_options(SPEC, {}))
    assert statistics_units(IDENTITY, wanted, shape_of(1))[0].fingerprint == (
        "9964e94a56de8d64de1b74376b5990e935566f69ba6bc103f975b7708d799dc1"
    )


@pytest.mark.parametrize("field", sorted(IDENTITY_FIELDS))
def test_sequential_units_are_others_where_the_input_differs(field):
    one = fingerprints(units_of(schedule="sequential"))
    two = fingerprints(units_of(schedule="sequential", identity=another_identity(field)))
    assert not set(one.values()) & set(two.values())


@pytest.mark.parametrize("field", sorted(IDENTITY_FIELDS))
def test_all_units_are_others_where_the_input_differs(field):
    one, two = fingerprints(units_of()), fingerprints(units_of(identity=another_identity(field)))
    assert one.keys() == two.keys()
    assert not set(one.values()) & set(two.values())


@pytest.mark.parametrize(
    "changes", [{"revision": 2}, {"round_to": 4}, {"slice_head": True}, {"pca_on": "normed"}]
)
def test_the_method_and_its_options_make_all_units_of_compression_others(changes):
    one, two = fingerprints(units_of()), fingerprints(units_of(**changes))
    assert one.keys() == two.keys()
    assert [n for n in one if one[n] == two[n] and not n.startswith("statistics")] == []


def test_another_slice_needs_no_other_statistics_and_leaves_the_head_as_it_is():
    one, two = fingerprints(units_of()), fingerprints(units_of(slice_=0.5))
    assert one.keys() == two.keys()
    same = {name for name in one if one[name] == two[name]}
    assert same == {*(n for n in one if n.startswith("statistics")), "basis-site-00006", "head"}


@given(st.integers(1, 12))
def test_every_site_is_observed_by_exactly_one_layer(num_layers):
    wanted = SPEC.statistics(shape_of(num_layers), resolve_options(SPEC, {"slice_head": True}))
    layers = [layer_statistics(shape_of(num_layers), wanted, i) for i in range(num_layers)]
    taps = [statistic.tap for statistic in chain.from_iterable(layers)]
    assert taps == ["resid_attn", "resid_mlp"] * (num_layers - 1) + [
        "resid_attn",
        "resid_mlp",
        "resid_out",
    ]


def test_the_last_site_is_observed_only_where_it_is_to_be_sliced():
    def taps(**options):
        return {s.tap for s in SPEC.statistics(shape_of(1), resolve_options(SPEC, options))}

    assert taps() == {"resid_attn", "resid_mlp"}
    assert taps(rotation="shared") == taps(slice_head=True) == taps() | {"resid_out"}


def test_the_last_tap_is_the_last_that_the_forward_pass_comes_by():
    some = [Statistic(tap, "gram") for tap in ("mlp_in", "resid_attn", "o_in")]
    assert last_tap(some) == "mlp_in"
    assert last_tap([*some, Statistic("resid_out", "cosine")]) == "resid_out"
    assert last_tap([]) == "resid_attn"


def test_every_layer_observes_how_much_it_changes_the_residual_stream():
    cosine = Statistic("resid_out", "cosine")
    assert [layer_statistics(shape_of(3), frozenset({cosine}), i) for i in range(3)] == [
        [cosine]
    ] * 3
