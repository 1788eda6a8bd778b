"""Perplexity, against a plain computation with transformers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.messages import WorkerSetup
from actors.storage.files import Directory
from orchestrator.backend.local import LocalExecutor
from orchestrator.engine.work_context import WorkContext
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.evaluate import Loss, agree, evaluate, evaluation_plan, settled
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepared import dense_subject
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger
from tests.builders import LENGTH, compress_local, prepared_run, run_local, save_model, worker_gib

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


def test_losses_agree_up_to_a_ten_thousandth():
    exact = Loss(nats=1000.0, num_tokens=100)
    assert agree(exact, Loss(nats=1000.09, num_tokens=100))
    assert agree(exact, Loss(nats=999.91, num_tokens=100))
    assert not agree(exact, Loss(nats=1000.11, num_tokens=100))


class CountingJournal(Journal):
    """Counts the parts that were evaluated."""

    def __init__(self, run):
        super().__init__(run, lambda _: None)
        self.num_parts = 0

    def emit(self, kind, **facts):
        self.num_parts += kind == "evaluate"
        super().emit(kind, **facts)


def evaluated(prepared, own_dtype):
    """Return the loss of the dense model as an accelerator measures it, and the parts it did."""
    journal = CountingJournal(prepared.run)
    setup = WorkerSetup(name="pattern", incarnation="", threads=1, device="cpu")
    pool = Pool(LocalExecutor(), setup, num_workers=1, journal=journal)
    run = Directory(prepared.config.out)
    context = WorkContext(run=run, ledger=Ledger(run), journal=journal, pool=pool)
    plan = replace(evaluation_plan(prepared), own_dtype=own_dtype)
    subject = dense_subject(prepared)
    return evaluate(context, settled(context, plan, subject), subject), journal.num_parts


def test_an_accelerator_measures_losses_in_float32_where_the_models_own_dtype_differs(tmp_path):
    model = save_model(tmp_path / "model")
    prepared = prepared_run(model, tmp_path / "run")
    open_run(prepared)
    on_a_cpu, parts = evaluated(prepared, "")
    found, with_trials = evaluated(prepared, "bfloat16")  # random weights, so losses differ
    assert (found, with_trials) == (on_a_cpu, 2)  # a part for each trial; the rest has records
    assert found.dtype == "float32"
    assert evaluated(prepared, "bfloat16") == (found, 0)  # a resumed run decides the same
    assert parts > 0


def test_and_in_its_own_dtype_where_that_makes_no_difference(tmp_path):
    model = save_model(tmp_path / "model")
    prepared = prepared_run(model, tmp_path / "run")
    open_run(prepared)
    exact, _ = evaluated(prepared, "")
    found, _ = evaluated(prepared, "float64")
    assert found.dtype == "float64"
    assert found.nats == pytest.approx(exact.nats, rel=1e-5)
    assert found.nats != exact.nats
