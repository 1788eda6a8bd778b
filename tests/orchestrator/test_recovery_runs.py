"""Runs that train their result: what is kept is better, loads, and has the same bits."""

import contextlib
import math
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from actors.storage.files import Directory
from actors.storage.records import read_record, read_records
from actors.storage.sources import embedded_model
from actors.training.steps import Steps
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.backend.local import LocalExecutor
from planners.errors import ConfigError, ModelError, NumericsError, StorageError
from planners.recovery import SHRUNK
from tests.builders import (
    DeadDriverError,
    compress_local,
    logits_of,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

LENGTH = 64
HOW = {"batch": 4, "parts": 2, "tokens": 12 * 4 * LENGTH, "warmup": 2, "save_steps": 3,
       "held_out": 8, "learning_rates": [0.005, 0.002]}  # fmt: skip
CUTS = {
    "modegpt": {"method": "modegpt", "keep_fraction": 0.6, "options": {"allocation": "uniform"}},
    "svdllm": {"method": "svdllm", "keep_fraction": 0.6},
    "slicegpt": {"method": "slicegpt", "slice": 0.25},
    "one basis": {"method": "slicegpt", "slice": 0.25, "options": {"rotation": "shared"}},
}
EASY = CUTS["modegpt"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return the model that comes with the package, which is trained, with a little text."""
    folder = tmp_path_factory.mktemp("model")
    tiny = embedded_model()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny / name, folder / name)
    for split, count in (("calibration", 40), ("evaluation", 8)):
        ids = load_file(tiny / f"{split}.safetensors")["input_ids"][:count, :LENGTH]
        (folder / "tokens").mkdir(exist_ok=True)
        save_file({"input_ids": ids.contiguous()}, folder / "tokens" / f"{split}.safetensors")
    return folder


def recovered(model, out, *, mode="local", cut=EASY, how=compress_local, **keys):
    more = {key: keys.pop(key) for key in ("executor", "workers", "listener") if key in keys}
    return how(model, out, **cut, **more, recover={"mode": mode, **HOW, **keys})


def choice_of(out):
    """Return the held-out losses before and after, in nats, and if the trained model is used."""
    values = read_record(Directory(str(out)), "recover-choice").values
    return values["nats"]["unrecovered"], values["nats"]["recovered"], values["used"]


SAMPLE = (("local", "slicegpt"), ("local", "one basis"), ("global", "svdllm"))
OTHERS = [(m, cut) for m in ("local", "global") for cut in CUTS if (m, cut) not in SAMPLE]


@pytest.mark.parametrize(
    ("mode", "cut"),
    [*SAMPLE, *(pytest.param(*each, marks=pytest.mark.nightly) for each in OTHERS)],
)
def test_the_held_out_loss_falls(model, tmp_path, mode, cut):
    recovered(model, tmp_path / "run", mode=mode, cut=CUTS[cut])
    before, after, used = choice_of(tmp_path / "run")
    assert after < before
    assert used


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "cut"), [("local", "slicegpt"), ("global", "modegpt")])
def test_the_result_is_what_was_measured(model, tmp_path, mode, cut):
    report = recovered(model, tmp_path / "run", mode=mode, cut=CUTS[cut], how=run_local)
    found = report["recovery"]
    assert found["used"]
    losses = found["held_out_perplexity"]
    assert losses["after"] < losses["before"]
    assert report["verify"]["passed"]
    ids = load_file(model / "tokens" / "evaluation.safetensors")["input_ids"]
    logits = logits_of(tmp_path / "run" / "model", ids, trust_remote_code=True)
    nats = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert "Then trained" in (tmp_path / "run" / "model" / "README.md").read_text()
    said = report["evaluation"]["compressed"]["perplexity"]
    assert math.exp(float(nats)) == pytest.approx(said, rel=1e-5)
    rows = found["layers"]
    if mode == "local":
        assert [row["layer"] for row in rows] == list(range(5))
        assert all(row["after"] < row["before"] for row in rows if row["kept"])
        assert sum(row["kept"] for row in rows) >= 4  # of the first one hardly anything is lost
        assert found["nothing"] == ["embedding", "final norm", "head"]
    else:
        tokens = 4 * LENGTH
        assert [at for at, _ in found["curve"]] == [tokens * (n + 1) for n in range(12)]
        first, *_, last = found["held_out_curve"]
        assert (first[0], last[0]) == (0, 12 * tokens)
        assert last[1] < first[1]
    for folder in ("unrecovered", "recovered", "training", "boundary"):
        assert not list((tmp_path / "run").glob(f"{folder}/*"))


@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_recovery_that_does_not_help_returns_its_input(model, tmp_path, mode):
    compress_local(model, tmp_path / "plain", **EASY)
    recovered(model, tmp_path / "run", mode=mode, learning_rates=[1.0], warmup=0)
    before, after, used = choice_of(tmp_path / "run")
    assert before == after  # no step was better than none
    assert not used
    assert weights(tmp_path / "run") == weights(tmp_path / "plain")


def weights(out):
    return {n: data for n, data in result_files(out).items() if n.endswith(".safetensors")}


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    found = {}
    for mode in ("local", "global"):
        out = tmp_path_factory.mktemp(mode) / "run"
        recovered(model, out, mode=mode)
        assert choice_of(out)[2]  # else nothing would be compared below
        found[mode] = weights(out)
    return found


@pytest.mark.parametrize("workers", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_more_workers_give_the_same_bytes(model, tmp_path, undisturbed, workers):
    recovered(model, tmp_path / "run", workers=workers)
    assert weights(tmp_path / "run") == undisturbed["local"]


def test_a_trained_model_that_was_damaged_on_disk_is_refused(model, tmp_path):
    out = tmp_path / "run"

    def damage(event):
        if event["kind"] == "recover_model":
            path = max(out.glob("training/*.safetensors"))  # of the last step
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    with pytest.raises(StorageError, match=r"recover-model.*does not match the hash"):
        recovered(model, out, mode="global", listener=damage)


@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_worker_lost_between_two_checkpoints_costs_the_steps_since_the_last(
    model, tmp_path, monkeypatch, undisturbed, mode
):
    taken, step = [], Steps.step

    def lost_once(self, gradients, rate):
        taken.append(rate)
        if len(taken) == 8:
            raise WorkerLost(FailureClass.WORKER_CRASHED, "gone")
        step(self, gradients, rate)

    monkeypatch.setattr(Steps, "step", lost_once)
    recovered(model, tmp_path / "run", mode=mode, workers=2)
    assert weights(tmp_path / "run") == undisturbed[mode]
    # It was saved after 3 and after 6 steps of the trials and the training.
    whole = 12 + 2 * 3
    layers = 5 if mode == "local" else 1
    assert len(taken) == layers * whole + 2


@pytest.mark.parametrize("mode", ["local", "global"])
def test_a_driver_that_dies_leaves_a_training_that_goes_on(
    model, tmp_path, monkeypatch, undisturbed, mode
):
    taken, step = [], Steps.step

    def dies_once(self, gradients, rate):
        taken.append(rate)
        if len(taken) == 8:
            raise DeadDriverError
        step(self, gradients, rate)

    monkeypatch.setattr(Steps, "step", dies_once)
    recovered(model, tmp_path / "run", mode=mode, executor=Mortal())
    assert len(taken) == 8
    assert (tmp_path / "run" / SHRUNK / "config.json").exists()
    recovered(model, tmp_path / "run", mode=mode)
    assert weights(tmp_path / "run") == undisturbed[mode]


class Mortal(LocalExecutor):
    """Lets the death of a driver through that happens in a call of a worker."""

    def call(self, handle, method, *args, num_returns=1, label):
        ticket = super().call(handle, method, *args, num_returns=num_returns, label=label)
        for each in ticket if isinstance(ticket, tuple) else (ticket,):
            if isinstance(each.error, DeadDriverError):
                raise each.error
        return ticket


@pytest.mark.nightly
def test_what_trains_is_asked_for(model, tmp_path):
    shrunk, found = shrunk_tensors(model, tmp_path), {}
    for name in ("made", "all", "lora"):
        rates = [0.03] if name == "lora" else [0.01]
        recovered(model, tmp_path / name, mode="global", trains=name, learning_rates=rates, rank=2)
        result = tensors_of(tmp_path / name / "model")
        assert choice_of(tmp_path / name)[2]
        assert shrunk.keys() == result.keys()
        found[name] = {n for n, t in result.items() if not torch.equal(t, shrunk[n])}
    assert "model.embed_tokens.weight" not in found["made"] | found["all"] | found["lora"]
    assert "model.norm.weight" in found["all"]
    assert "model.norm.weight" not in found["made"]
    assert found["lora"]
    assert all("proj" in name for name in found["lora"])


def shrunk_tensors(model, folder):
    out = folder / "plain"
    if not out.exists():
        compress_local(model, out, **EASY)
    return tensors_of(out / "model")


def tensors_of(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_a_rate_that_only_raises_the_loss_ends_the_run_in_a_line_with_the_result_still_there(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("actors.training.course.RISING_STEPS", 3)
    monkeypatch.setattr("actors.training.course.RISING", 0.5)
    with pytest.raises(NumericsError) as failed:
        recovered(model, tmp_path / "run", mode="global", learning_rates=[0.01])
    assert "\n" not in str(failed.value)
    assert "loss" in str(failed.value)
    assert "smaller rate" in failed.value.hint
    assert f"{tmp_path}/run/unrecovered" in failed.value.hint
    assert not (tmp_path / "run" / "READY").exists()
    assert not (tmp_path / "run" / "model" / "config.json").exists()
    ids = load_file(model / "tokens" / "evaluation.safetensors")["input_ids"]
    logits = logits_of(tmp_path / "run" / SHRUNK, ids, trust_remote_code=True)
    assert torch.isfinite(logits).all()


BAD = {
    "too few for a batch": ({"batch": 64}, ConfigError, "a step needs 64 sequences"),
    "too few for a step": ({"tokens": 100}, ConfigError, "less than the 256 of one step"),
    "parts": ({"parts": 3}, ConfigError, "does not divide the 4 sequences"),
    "a prompt of all": ({"data": "self", "prompt_tokens": 64}, ConfigError, "sequences have 64"),
    "layers alone in others": (
        {"mode": "local", "replace": "linear"},
        ConfigError,
        "trained alone have no others",
    ),
    "no layers to put in": (
        {"loss": "labels", "replace": "linear"},
        ConfigError,
        "there is no input model",
    ),
    "a teacher of layers": ({"mode": "local", "teacher": "{model}"}, ConfigError, "alone"),
}


@pytest.mark.parametrize(("keys", "error", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_trained_is_refused_before_any_work(model, tmp_path, keys, error, said):
    keys = {k: v.format(model=model) if isinstance(v, str) else v for k, v in keys.items()}
    with pytest.raises(error) as refused:
        prepared_run(model, tmp_path / "run", **EASY, recover={"mode": "global", **HOW, **keys})
    assert "\n" not in str(refused.value)
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_another_vocabulary_in_a_teacher_is_refused(model, tmp_path):
    other = save_model(tmp_path / "other", vocab_size=96)
    with pytest.raises(ModelError, match="vocabulary of 96 tokens"):
        prepared_run(model, tmp_path / "run", **EASY,
                     recover={"mode": "global", **HOW, "teacher": str(other)})  # fmt: skip


def test_what_is_rounded_is_not_trained(model, tmp_path):
    with pytest.raises(ConfigError, match="rounded weights cannot be trained") as refused:
        prepared_run(model, tmp_path / "run", method="gptq", options={"bits": 4, "group": 16},
                     recover={"mode": "local", **HOW})  # fmt: skip
    assert "run gptq on" in refused.value.hint


def replacing(model, out, *, cut=EASY, **keys):
    how = {"mode": "global", **HOW, "replace": "linear", **keys}
    return prepared_run(model, out, **cut, recover=how)


@pytest.mark.parametrize("cut", ["slicegpt", "as a step"])
def test_layers_are_not_replaced_across_a_rotation(model, tmp_path, cut):
    mlp = {"method": "modegpt", "keep_fraction": 0.6, "options": {"modules": "mlp"}}
    steps = [CUTS["slicegpt"], mlp]
    given = {"steps": steps} if cut == "as a step" else CUTS[cut]
    with pytest.raises(ConfigError, match="slicegpt rotates the residual stream") as refused:
        replacing(model, tmp_path / "run", cut=given)
    assert "\n" not in str(refused.value)
    assert refused.value.hint


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 2}, {"hidden_size": 48}])
def test_layers_are_not_replaced_by_those_of_a_teacher_of_other_sizes(model, tmp_path, sizes):
    shape = replacing(model, tmp_path / "run").plan.shape
    own = {"num_hidden_layers": shape.num_layers, "hidden_size": shape.hidden,
           "vocab_size": shape.vocab_size}  # fmt: skip
    same = save_model(tmp_path / "same", **own)
    assert replacing(model, tmp_path / "run", teacher=str(same)).recovery.replace == "linear"
    other = save_model(tmp_path / "other", **{**own, **sizes})
    with pytest.raises(ConfigError, match="replace: the teacher is llama with") as refused:
        replacing(model, tmp_path / "run", teacher=str(other))
    assert "input model" in refused.value.hint


@pytest.mark.nightly
def test_a_teacher_of_its_own_is_learnt_from(model, tmp_path):
    other = save_model(tmp_path / "a model", vocab_size=512, num_hidden_layers=2)
    curves = []
    for name, keys in (("own", {}), ("other", {"teacher": str(other)})):
        with contextlib.suppress(NumericsError):
            recovered(model, tmp_path / name, mode="global", **keys)
        manifest = read_record(Directory(str(tmp_path / name)), "recover-model").values
        curves.append([each["loss"] for each in manifest["history"]])
    assert curves[0][0] != curves[1][0]


def test_the_last_of_several_steps_is_trained(model, tmp_path):
    steps = [
        {"method": "modegpt", "keep_fraction": 0.9, "options": {"modules": "mlp"}},
        {"method": "slicegpt", "keep_fraction": 0.8},
    ]
    recovered(model, tmp_path / "run", cut={"steps": steps})
    assert choice_of(tmp_path / "run")[2]
    names = read_records(Directory(str(tmp_path / "run" / "steps" / "1-modegpt")))
    assert not [name for name in names if "recover" in name]


def test_a_layer_of_which_little_was_lost_keeps_what_it_has(model, tmp_path, monkeypatch):
    monkeypatch.setattr("actors.training.course.RISING_STEPS", 1)
    monkeypatch.setattr("actors.training.course.RISING", 0.0)  # any loss is far above the start
    plain = {"learning_rates": [0.01]}
    recovered(model, tmp_path / "run", **plain)
    assert not choice_of(tmp_path / "run")[2]


def test_statistics_of_another_run_are_reused(model, tmp_path, undisturbed):
    compress_local(model, tmp_path / "before", **EASY, keep_statistics=True)
    recovered(model, tmp_path / "run", how=partial(compress_local, stats=str(tmp_path / "before")))
    assert weights(tmp_path / "run") == undisturbed["local"]


def test_settings_without_a_mode_are_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="nothing is trained"):
        prepared_run(model, tmp_path / "run", **EASY, recover={"tokens": 100})


def test_layers_alone_have_no_labels(model, tmp_path):
    with pytest.raises(ConfigError, match="no labels"):
        prepared_run(model, tmp_path / "run", **EASY, recover={"mode": "local", "loss": "labels"})


def test_text_that_is_too_short_is_repeated(model, tmp_path):
    source = f"tokens:{model}/tokens/evaluation.safetensors"
    how = {**HOW, "data": source, "held_out": 2, "tokens": 12 * 4 * LENGTH}
    found = prepared_run(model, tmp_path / "run", **EASY, recover={"mode": "local", **how})
    assert found.recovery_tokens.shape == (8, LENGTH)
    assert found.recovery.steps == 12
