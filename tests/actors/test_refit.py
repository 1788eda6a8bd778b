"""Refit: what it solves, what it leaves alone, and that a resumed run is the same run."""

import json

import pytest
import torch
from safetensors.torch import load_file

from actors.numerics.least_squares import empty_sums, least_squares_step, refit
from planners.errors import PlanError
from planners.refit import RIDGES, cuts
from tests.builders import (
    compress_local,
    layer_file,
    perplexity,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

DIM, OUT = 12, 7
RECIPE = {
    "method": "modegpt",
    "keep_fraction": 0.7,
    "options": {"allocation": "uniform", "refit": True},
}


def tokens(count, seed, *, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(99))
    return (torch.randn(count, DIM, generator=generator) @ mixing).to(dtype)


def noise(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, OUT, generator=generator, dtype=torch.float64)


def sums_of(inputs, rest):
    sums = empty_sums(DIM, OUT, device="cpu")
    for part, left in zip(inputs.split(50), rest.split(50), strict=True):
        sums.add(part, left)
    return sums


def weight_and_truth():
    generator = torch.Generator().manual_seed(5)
    old = torch.randn(OUT, DIM, generator=generator, dtype=torch.float64)
    return old, old + 0.3 * torch.randn(OUT, DIM, generator=generator, dtype=torch.float64)


def test_without_damping_the_step_is_that_of_least_squares():
    old, truth = weight_and_truth()
    z = tokens(400, 1)
    target = z @ truth.T + 0.5 * noise(400, 2)
    step, rung = least_squares_step(sums_of(z, target - z @ old.T), damping=0.0, where="here")
    expected = torch.linalg.lstsq(z, target).solution
    torch.testing.assert_close(old.T + step, expected, rtol=0, atol=1e-5)  # rests are float32
    assert rung == "cholesky"


def test_damping_pulls_the_weights_towards_what_they_were():
    old, truth = weight_and_truth()
    z = tokens(400, 1)
    sums = sums_of(z, z @ (truth - old).T)
    sizes = [
        float(least_squares_step(sums, damping=damping, where="here")[0].norm())
        for damping in (1e-6, 1e-2, 1.0, 100.0)
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.05 * sizes[0]


def test_what_is_left_of_unseen_tokens_is_what_the_weights_leave():
    old, truth = weight_and_truth()
    z = tokens(100, 3)
    target = z @ truth.T + noise(100, 4)
    unseen = sums_of(z, target - z @ old.T)
    seen_z = tokens(400, 1)
    found = refit(old, sums_of(seen_z, seen_z @ (truth - old).T), unseen,
                  dampings=RIDGES, where="here")  # fmt: skip
    for weight, said in ((old, found.before), (found.weight, found.after)):
        assert float((target - z @ weight.T).square().sum()) == pytest.approx(said, rel=1e-5)
    assert found.after < 0.5 * found.before


def test_held_out_tokens_choose_the_damping():
    old, truth = weight_and_truth()
    few = tokens(14, 1)
    seen = sums_of(few, few @ (truth - old).T + 3 * noise(14, 2))
    z = tokens(400, 3)
    unseen = sums_of(z, z @ (truth - old).T)
    found = refit(old, seen, unseen, dampings=RIDGES, where="here")
    alone = {d: refit(old, seen, unseen, dampings=(d,), where="here").after for d in RIDGES}
    assert found.after == min(alone.values())
    assert found.damping in (-1.0, min(alone, key=alone.get))


def test_weights_stand_where_no_damping_helps_held_out_tokens():
    old, truth = weight_and_truth()
    z = tokens(400, 1)
    seen, unseen = sums_of(z, z @ (truth - old).T), sums_of(z, z @ (old - truth).T)
    found = refit(old, seen, unseen, dampings=RIDGES, where="here")
    assert torch.equal(found.weight, old)
    assert found.damping == -1.0
    assert found.after == found.before


def test_a_linear_that_is_right_already_stays_as_it_is():
    old, _ = weight_and_truth()
    z = tokens(400, 1)
    exact = sums_of(z, torch.zeros(400, OUT, dtype=torch.float64))
    assert torch.equal(refit(old, exact, exact, dampings=RIDGES, where="here").weight, old)


@pytest.mark.parametrize("num_sequences", [2, 7, 8, 20, 64])
def test_fitted_and_held_out_sequences_are_all_of_them_once(num_sequences):
    fitted, held = cuts(num_sequences, size=3)
    rows = [row for part in (*fitted, *held) for row in range(*part)]
    assert rows == list(range(num_sequences))
    assert sum(b - a for a, b in held) == max(1, num_sequences // 8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), attention_bias=True)


@pytest.fixture(scope="module")
def refitted(model, tmp_path_factory):
    """Return the directory of a run whose driver dies before it verifies."""
    out = tmp_path_factory.mktemp("runs") / "refitted"
    compress_local(model, out, **RECIPE)
    return out


def record(out, unit):
    return json.loads((out / "records" / f"{unit}.json").read_text())["values"]


def layers_of(out, folder):
    return [load_file(path) for path in sorted((out / folder).glob("layer-*.safetensors"))]


def test_the_result_is_whichever_has_the_lower_held_out_loss(refitted):
    found = record(refitted, "refit-losses")
    assert found["used"] == (found["nats"]["refitted"] < found["nats"]["drafted"])
    chosen = "refit" if found["used"] else "draft"
    for layer, path in enumerate(sorted((refitted / chosen).glob("*"))):
        assert path.read_bytes() == layer_file(refitted / "model", layer).read_bytes()


def changed_by_refit(out):
    return {
        name.split(".", 3)[-1]
        for draft, new in zip(layers_of(out, "draft"), layers_of(out, "refit"), strict=True)
        for name in draft
        if not torch.equal(draft[name], new[name])
    }


def test_only_the_linears_that_write_into_the_residual_stream_change(refitted):
    assert changed_by_refit(refitted) == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}


def test_of_two_factors_the_second_is_refitted(model, tmp_path):
    recipe = {"method": "svdllm", "keep_fraction": 0.7, "options": {"refit": True}}
    compress_local(model, tmp_path / "run", **recipe)
    second = {"self_attn.o_proj.second.weight", "mlp.down_proj.second.weight"}
    assert changed_by_refit(tmp_path / "run") == second


def test_a_layer_of_full_width_stays_exact(model, tmp_path):
    out = tmp_path / "run"
    losses = compress_local(model, out, **{**RECIPE, "keep_fraction": 1.0})
    dense = load_file(model / "model.safetensors")
    for layer in layers_of(out, "refit"):
        for name, tensor in layer.items():
            torch.testing.assert_close(tensor, dense[name], rtol=0, atol=1e-5)
    assert losses["compressed"] == pytest.approx(losses["dense"], rel=1e-5)


@pytest.mark.parametrize(
    "unit", ["draft-layer-00001", "refit-start", "refit-layer-00001", "refit-losses", "layer-00002"]
)
def test_a_resumed_run_gives_the_same_bytes(unit, model, refitted):
    before = result_files(refitted)
    (refitted / "records" / f"{unit}.json").unlink()
    compress_local(model, refitted, **RECIPE)
    assert (refitted / "records" / f"{unit}.json").exists()
    assert result_files(refitted) == before
    assert perplexity(refitted, "compressed") > 0
    assert not list((refitted / "boundary").glob("*"))


def test_a_finished_run_says_what_the_second_pass_found_and_leaves_nothing_of_it(model, tmp_path):
    out = tmp_path / "run"
    report = run_local(model, out, **RECIPE)
    assert report["verify"]["passed"]
    perplexities = report["refit"]["held_out_perplexity"]
    assert set(perplexities) == {"dense", "drafted", "refitted"}
    assert report["refit"]["used"] == (perplexities["refitted"] < perplexities["drafted"])
    assert all(layer["refit"]["linears"].keys() == {"o_proj", "down_proj"}
               for layer in report["layers"])  # fmt: skip
    assert not [p for name in ("boundary", "draft", "refit") for p in (out / name).rglob("*")]


def test_one_sequence_is_too_few_to_hold_some_out(model, tmp_path):
    with pytest.raises(PlanError, match="refit"):
        prepared_run(model, tmp_path / "run", calibration={"sequences": 1}, **RECIPE)
