"""Sequential slicing: what it leaves alone, what it sees, and what a lost file costs."""

import pytest
import torch

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors
from planners.errors import PlanError
from tests.builders import (
    compress_local,
    layer_file,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

SEQUENTIAL = {"schedule": "sequential"}
SITES = range(7)  # of the three layers of the model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sliced(model, tmp_path_factory):
    """A run whose driver died when all was compressed: its bases and records are all there."""
    out = tmp_path_factory.mktemp("sliced") / "run"
    compress_local(model, out, options=SEQUENTIAL)
    return out


def basis(out, site):
    return read_tensors(Directory(str(out)), f"basis/basis-site-{site:05d}.safetensors")


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("pca_on", ["residual", "normed"])
def test_full_width_changes_nothing(tmp_path, model_type, pca_on):
    model = save_model(tmp_path / "model", model_type=model_type)
    options = {**SEQUENTIAL, "pca_on": pca_on}
    found = compress_local(model, tmp_path / "run", slice=0.0, options=options)
    assert found["compressed"] == pytest.approx(found["dense"], rel=1e-5)


@pytest.mark.parametrize("pca_on", ["residual", "normed"])
def test_at_full_width_the_sites_are_those_of_the_dense_model(model, tmp_path, pca_on):
    for schedule in ("dense", "sequential"):
        options = {"schedule": schedule, "pca_on": pca_on}
        compress_local(model, tmp_path / schedule, slice=0.0, options=options)
    for site in SITES[:-1]:  # the last one stays whole, and the dense schedule does not look at it
        dense, found = (basis(tmp_path / s, site)["values"] for s in ("dense", "sequential"))
        assert torch.allclose(found, dense, rtol=1e-4, atol=1e-6 * float(dense[0]))


def test_only_the_first_site_sees_what_the_dense_model_computes(model, sliced, tmp_path):
    compress_local(model, tmp_path / "run")
    dense, found = (
        [basis(out, s)["values"] for s in SITES[:-1]] for out in (tmp_path / "run", sliced)
    )
    same = [torch.allclose(a, b, rtol=1e-4) for a, b in zip(dense, found, strict=True)]
    assert same == [True] + [False] * 5


def test_a_site_sees_what_the_shipped_layers_compute(model, sliced):
    """The gram before the first MLP, from the files that ship and plain formulas."""
    from transformers import AutoModelForCausalLM

    shipped = AutoModelForCausalLM.from_pretrained(
        sliced / "model", trust_remote_code=True, local_files_only=True
    )
    seen = []
    norm = shipped.model.layers[1].input_layernorm
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    tokens = Checkpoint(str(model)).directory
    ids = read_tensors(tokens, "tokens/calibration.safetensors")["input_ids"]
    with torch.inference_mode():
        shipped(ids)
    x = seen[0].flatten(0, 1).double()
    # In its own axes the stream of a site has a diagonal gram: the kept eigenvalues.
    values = basis(sliced, 2)["values"][: x.shape[1]]
    assert torch.allclose(x.T @ x, values.diag(), atol=1e-4 * float(values[0]))


def test_nothing_is_calibrated_and_every_site_is_reported(model, tmp_path):
    report = run_local(model, tmp_path / "run", options=SEQUENTIAL)
    assert [site["site"] for site in report["sites"]] == list(SITES)
    assert all(0 < site["energy_kept"] <= 1 + 1e-12 for site in report["sites"])
    assert [site["keep_dim"] for site in report["sites"]] == [24] * 6 + [32]
    assert report["verify"]["passed"]
    names = Directory(str(tmp_path / "run")).names()
    assert not [n for n in names if n.startswith(("stats/", "boundary/", "records/statistics"))]


def test_a_layer_whose_records_are_lost_comes_out_the_same(model, tmp_path):
    out = tmp_path / "run"
    compress_local(model, out, options=SEQUENTIAL)
    expected = result_files(out)
    bases = {
        site: (out / f"basis/basis-site-{site:05d}.safetensors").read_bytes() for site in SITES
    }
    for unit in ("basis-site-00002", "basis-site-00003", "basis-site-00005", "layer-00001"):
        (out / f"records/{unit}.json").unlink()
    for site in (2, 3, 5):
        (out / f"basis/basis-site-{site:05d}.safetensors").unlink()
    layer_file(out / "model", 1).unlink()
    compress_local(model, out, options=SEQUENTIAL)
    assert result_files(out) == expected
    for site, data in bases.items():
        assert (out / f"basis/basis-site-{site:05d}.safetensors").read_bytes() == data


def test_no_more_than_two_streams_are_kept(model, tmp_path):
    seen = []

    def look(event):
        if event["kind"] in ("stream", "basis_sequential"):
            names = Directory(str(tmp_path / "run")).names("boundary")
            seen.append(len({name.split("-mb-")[0] for name in names if "-mb-" in name}))

    compress_local(model, tmp_path / "run", options=SEQUENTIAL, listener=look)
    assert max(seen) == 2
    assert not Directory(str(tmp_path / "run")).names("boundary")
    assert not [n for n in Directory(str(tmp_path / "run")).names("records") if "stream" in n]


class DeadError(Exception):
    """A driver that is gone."""


@pytest.mark.parametrize("unit", ["stream-site-00003-shard-00002", "basis-site-00004"])
def test_a_driver_that_dies_on_the_way_is_followed_by_one_that_ends_with_the_same_bytes(
    model, sliced, tmp_path, unit
):
    before, after = set(), set()

    def die(event):
        before.add(event["unit"])
        if event["unit"] == unit:
            raise DeadError

    out = tmp_path / "run"
    with pytest.raises(DeadError):
        compress_local(model, out, options=SEQUENTIAL, listener=die)
    compress_local(model, out, options=SEQUENTIAL, listener=lambda event: after.add(event["unit"]))
    assert result_files(out) == result_files(sliced)
    twice = {name for name in before & after if name.startswith(("stream-", "basis-"))}
    assert not twice


def test_one_basis_for_all_sites_is_refused_with_the_reason(model, tmp_path):
    with pytest.raises(PlanError, match="rotation=shared needs all sites for its one basis"):
        prepared_run(model, tmp_path / "run", options={**SEQUENTIAL, "rotation": "shared"})


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_change_nothing_but_rounding(model, sliced, tmp_path, shards):
    compress_local(model, tmp_path / "run", options={**SEQUENTIAL, "shards": shards})
    for site in SITES:
        one, two = basis(sliced, site)["values"], basis(tmp_path / "run", site)["values"]
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(one[0]))


@pytest.mark.parametrize("size", [4, 5])
def test_sums_do_not_depend_on_the_cut_but_for_rounding(model, sliced, tmp_path, size):
    microbatch = {"microbatch_tokens": size * 24}
    compress_local(model, tmp_path / "run", options=SEQUENTIAL, calibration=microbatch)
    for site in SITES:
        one, two = basis(sliced, site)["values"], basis(tmp_path / "run", site)["values"]
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 * float(one[0]))


REFERENCE = {0.10: 2.6925, 0.20: 2.9877, 0.30: 3.2612}
PUBLISHED = {0.10: 49.0676, 0.20: 49.6456, 0.25: 49.8837, 0.30: 50.5066}


def perplexity_of_reference(shared, out, name, slice_):
    tokens = shared / "reference" / name
    return compress_local(
        shared / "models" / name,
        out,
        slice=slice_,
        options=SEQUENTIAL,
        calibration={
            "source": f"tokens:{tokens}.calibration.safetensors",
            "microbatch_tokens": 4096,
        },
        evaluation={"source": f"tokens:{tokens}.evaluation.safetensors"},
    )["compressed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "slice_",
    [
        # The same code at other widths: 13 s each.
        pytest.param(0.10, marks=pytest.mark.nightly),
        0.20,
        pytest.param(0.30, marks=pytest.mark.nightly),
    ],
)
def test_it_reproduces_an_independent_implementation(shared, tmp_path, slice_):
    found = perplexity_of_reference(shared, tmp_path / "run", "babyllama105", slice_)
    assert found == pytest.approx(REFERENCE[slice_], rel=0.005)


@pytest.mark.nightly
@pytest.mark.parametrize("slice_", PUBLISHED)
def test_it_is_no_worse_than_the_published_program(shared, tmp_path, slice_):
    found = perplexity_of_reference(shared, tmp_path / "run", "llama-8m-ref", slice_)
    assert found <= PUBLISHED[slice_] * 1.005
