"""Perplexity, against a plain computation with transformers."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orchestrator.phases.evaluate import Loss
from tests.builders import LENGTH, compress_local, run_local, save_model, worker_gib

TYPES = ("llama", "mistral", "qwen2")


@torch.inference_mode()
def plain_perplexity(folder, model):
    """Return the perplexity of a checkpoint on the evaluation tokens of ``model``."""
    ids = load_file(model / "tokens" / "evaluation.safetensors")["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=True, local_files_only=True
    )
    log_p = found.eval()(ids).logits[:, :-1].log_softmax(-1)
    nats = -log_p.gather(-1, ids[:, 1:, None])
    return float(nats.mean().exp())


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("rotation", ["per_site", "shared"])
def test_perplexity_is_that_of_a_plain_computation(tmp_path, model_type, rotation):
    model = save_model(tmp_path / "model", model_type=model_type)
    out = tmp_path / "run"
    found = compress_local(model, out, options={"rotation": rotation})
    assert found["dense"] == pytest.approx(plain_perplexity(model, model), rel=1e-6)
    assert found["compressed"] == pytest.approx(plain_perplexity(out / "model", model), rel=1e-6)


def test_waves_and_the_last_small_part_count_every_token_once(tmp_path):
    model = save_model(tmp_path / "model")
    memory = worker_gib(model, num_layers=1)
    found = compress_local(model, tmp_path / "run", worker_gib=memory)
    assert found["dense"] == pytest.approx(plain_perplexity(model, model), rel=1e-6)


def test_the_report_counts_predicted_tokens(tmp_path):
    model = save_model(tmp_path / "model")
    report = run_local(model, tmp_path / "run", evaluation={"sequences": 5})
    evaluation = report["evaluation"]
    assert evaluation["num_tokens"] == 5 * (LENGTH - 1)
    assert evaluation["sequence_length"] == LENGTH
    assert evaluation["source"] == f"tokens:{model}/tokens/evaluation.safetensors"
    assert report["parameters"]["before"] == count(model)
    assert report["parameters"]["after"] == count(tmp_path / "run" / "model")


def count(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True
    )
    return sum(parameter.numel() for parameter in model.parameters())


def test_a_mean_beyond_the_range_of_floats_is_infinite_and_no_error():
    assert Loss(nats=1e6, num_tokens=10).perplexity == float("inf")
    assert Loss(nats=0.0, num_tokens=10).perplexity == 1.0
