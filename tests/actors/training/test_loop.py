"""Training of whole models: what is trained, and that nobody can tell how often it was resumed."""

import pickle
import subprocess
import sys
from dataclasses import replace
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from actors.messages import TrainRequest
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet
from actors.training import loop
from actors.training.checkpoints import manifests, newest
from actors.training.division import Division
from actors.training.group import Alone, Processes
from actors.training.loop import train
from planners.errors import ConfigError, NumericsError
from planners.recovery import Recovery
from tests.builders import compress_local, save_model

UNIT, TOKENS = "recover-model", "tokens/recovery.parquet"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a model and a compressed one, in which one linear of each layer has two factors."""
    folder = tmp_path_factory.mktemp("models")
    dense = save_model(folder / "dense", tie_word_embeddings=True)
    compress_local(dense, folder / "run", method="svdllm", keep_fraction=0.9,
                   options={"modules": "up_proj"})  # fmt: skip
    return dense, folder / "run" / "model"


def request(models, out, *, save_every=1, **more):
    dense, student = models
    ids = load_file(dense / "tokens" / "calibration.safetensors")["input_ids"]
    Directory(str(out)).write(TOKENS, tokens_to_parquet(ids.numpy(), {}))
    given = {"mode": "global", "trains": "made", "steps": 4, "batch": 4, "parts": 2,
             "rates": (0.01, 0.001), "held_out": 3}  # fmt: skip
    return TrainRequest(
        unit=UNIT,
        fingerprint="f",
        run_uri=str(out),
        student_uri=str(student),
        checkpoint_uri=str(dense),
        recovery=Recovery(**{**given, **more}),
        tokens=TOKENS,
        dtype="float32",
        threads=1,
        device="cpu",
        save_every=save_every,
        stop="training/stop",
    )


def found(out):
    return newest(Directory(str(out)), UNIT, "f")


def result(out):
    return load_file(out / found(out).file.path)


def stopping(step, monkeypatch):
    """Let whatever trains end after so many steps."""
    left = iter(range(1, 1000))
    monkeypatch.setattr(loop._Watch, "stops", lambda _: next(left) == step)


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    train(request(models, out), Alone())
    return out


def test_what_a_cut_made_is_trained_with_the_norms_beside_it(models, trained):
    weights = result(trained)
    assert {name.partition("layers.")[2][2:] for name in weights} == {
        "mlp.up_proj.first.weight",
        "mlp.up_proj.second.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    course = found(trained).course
    assert course.best["loss"] < course.held_out[0]["loss"]
    assert len(course.history) == 1 + 1 + 4
    before = Checkpoint(str(models[1]))
    assert all(before.read(name).shape == each.shape for name, each in weights.items())


def test_all_is_the_layers_and_the_final_norm(models, tmp_path):
    train(request(models, tmp_path, trains="all", steps=1, rates=(0.01,)), Alone())
    left = {"model.embed_tokens.weight", "lm_head.weight"}
    assert result(tmp_path).keys() == Checkpoint(str(models[1])).names - left


def test_products_of_bfloat16_train_weights_of_float32(models, tmp_path):
    train(replace(request(models, tmp_path), dtype="bfloat16"), Alone())
    course = found(tmp_path).course
    assert course.best["loss"] < course.held_out[0]["loss"]
    assert all(each.dtype == torch.float32 for each in result(tmp_path).values())


def test_only_the_last_two_checkpoints_stay(trained):
    names = sorted(path.name for path in (trained / "training").iterdir())
    assert len(names) == 4
    assert [name.partition("-step-")[2][:5] for name in names] == ["00005"] * 2 + ["00006"] * 2
    assert found(trained).finished


def test_a_finished_training_is_not_done_again(models, trained):
    before = found(trained)
    train(replace(request(models, trained), student_uri="gone"), Alone())
    assert found(trained) == before


def stopped_and_resumed(models, out, monkeypatch, *, after, **how):
    with monkeypatch.context() as patch:
        stopping(after, patch)
        train(request(models, out, **how), Alone())
    assert found(out).course.step == after
    assert not found(out).finished
    train(request(models, out, **how), Alone())
    return found(out)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_resumed_training_has_the_same_bytes(models, trained, tmp_path, monkeypatch, after):
    resumed = stopped_and_resumed(models, tmp_path, monkeypatch, after=after)
    assert resumed.file.sha256 == found(trained).file.sha256
    assert resumed.course == found(trained).course


def test_resumed_adapters_have_the_same_bytes(models, tmp_path, monkeypatch):
    how = {"trains": "lora", "dropout": 0.2, "weight_decay": 0.1, "rates": (0.01,)}
    train(request(models, tmp_path / "whole", **how), Alone())
    resumed = stopped_and_resumed(models, tmp_path / "cut", monkeypatch, after=2, **how)
    assert resumed.file.sha256 == found(tmp_path / "whole").file.sha256


@pytest.mark.parametrize(
    "how", [{"replace": "linear"}, {"replace": "constant", "trains": "lora", "dropout": 0.2}]
)
def test_a_training_that_replaces_layers_resumes_to_the_same_bytes(
    models, tmp_path, monkeypatch, how
):
    how = {"steps": 6, "rates": (0.01,), "weight_decay": 0.1, "seed": 1, **how}
    train(request(models, tmp_path / "plain", **{**how, "replace": "none"}), Alone())
    train(request(models, tmp_path / "whole", **how), Alone())
    resumed = stopped_and_resumed(models, tmp_path / "cut", monkeypatch, after=3, **how)
    whole, plain = found(tmp_path / "whole"), found(tmp_path / "plain")
    assert resumed.file.sha256 == whole.file.sha256 != plain.file.sha256
    assert resumed.course == whole.course
    assert whole.course.held_out[0] == plain.course.held_out[0]
    assert whole.course.history[0]["loss"] != plain.course.history[0]["loss"]
    assert whole.course.best["step"] > 3  # else nothing was compared above


def test_a_damaged_checkpoint_is_passed_over(models, trained, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(3, patch)
        train(request(models, tmp_path), Alone())
    path = tmp_path / found(tmp_path).file.path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert found(tmp_path).course.step == 2
    assert manifests(Directory(str(tmp_path)), UNIT, "f")[0].course.step == 3
    train(request(models, tmp_path), Alone())
    assert found(tmp_path).file.sha256 == found(trained).file.sha256


def test_a_checkpoint_of_another_training_is_ignored(trained):
    assert newest(Directory(str(trained)), UNIT, "g") is None
    assert newest(Directory(str(trained)), "recover", "f") is None


def test_a_manifest_that_is_removed_while_it_is_read_is_passed_over(trained, monkeypatch):
    names = Directory.names
    gone = f"training/{UNIT}-step-00099-0123456789ab.json"
    monkeypatch.setattr(Directory, "names", lambda run, folder: [*names(run, folder), gone])
    assert found(trained).finished


def test_a_request_to_stop_saves_a_checkpoint(models, tmp_path):
    asked = request(models, tmp_path, save_every=100)
    Directory(str(tmp_path)).write(asked.stop, b"")
    train(asked, Alone())
    assert found(tmp_path).course.step == 1
    assert not found(tmp_path).finished


def test_a_machine_that_leaves_saves_a_checkpoint(models, tmp_path):
    class Leaving(Alone):
        def leaves(self):
            return True

    train(request(models, tmp_path, save_every=100), Leaving())
    assert found(tmp_path).course.step == 1


def test_a_failure_is_written_down_and_stays(models, tmp_path):
    asked = request(models, tmp_path, rates=(1e30,), relative=False, steps=3)
    for _ in range(2):
        with pytest.raises(NumericsError, match="recovery: the loss is"):
            train(asked, Alone())
    assert found(tmp_path).failure.startswith("recovery: the loss is")
    assert found(tmp_path).hint.startswith("use a smaller rate")


def test_a_rate_that_is_too_high_leaves_the_input(models, tmp_path):
    train(request(models, tmp_path, rates=(3.0,), steps=2), Alone())
    assert found(tmp_path).course.best["step"] == 0
    before = Checkpoint(str(models[1]))
    assert all(torch.equal(before.read(name), each) for name, each in result(tmp_path).items())


def test_a_model_in_which_nothing_was_made_is_refused(models, tmp_path):
    dense, _ = models
    with pytest.raises(ConfigError, match="nothing to train"):
        train(request((dense, dense), tmp_path), Alone())


SECOND = """
import os, pickle, sys
import torch
from torch import distributed
from actors.training.group import Processes
from actors.training.loop import train

torch.set_num_threads(1)
meeting, request = sys.argv[1:]
distributed.init_process_group("gloo", init_method="file://" + meeting, rank=1, world_size=2)
train(pickle.loads(bytes.fromhex(request)), Processes())
distributed.destroy_process_group()
os._exit(0)  # torch's own destructors of process groups abort at times
"""  # a process of its own that imports as little as it can


def by_two(asked, folder):
    """Train by two workers, of which this process is the first."""
    meeting = str(folder / f"meeting-{uuid4().hex}")
    second = [sys.executable, "-c", SECOND, meeting, pickle.dumps(asked).hex()]
    with subprocess.Popen(second) as other:
        try:
            distributed.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=0, world_size=2
            )
            train(asked, Processes())
            distributed.destroy_process_group()
        except BaseException:
            other.kill()
            raise
    assert other.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("replace", ["none", "linear"])
def test_two_workers_have_the_bytes_of_one_also_when_they_resume_it(
    models, tmp_path, monkeypatch, replace
):
    how = {"replace": replace, "steps": 6}
    train(request(models, tmp_path / "one", **how), Alone())
    out = tmp_path / "two"
    with monkeypatch.context() as patch:
        stopping(3, patch)
        train(request(models, out, **how), Alone())
    by_two(request(models, out, **how), tmp_path)
    assert found(out).file.sha256 == found(tmp_path / "one").file.sha256
    assert found(out).course == found(tmp_path / "one").course


WAYS = {
    "made": {"clip": 0.1},
    "all": {"trains": "all", "weight_decay": 0.1, "loss": "labels"},
    "lora": {"trains": "lora", "rank": 3, "dropout": 0.2, "parts": 4, "held_out": 4},
    "bfloat16": {"trains": "all", "parts": 4},
}


def watched(owner, name, patch):
    """Return a list that has an entry for each call of a method from now on."""
    seen, call = [], getattr(owner, name)

    def noting(*arguments, **more):
        seen.append(arguments)
        return call(*arguments, **more)

    patch.setattr(owner, name, noting)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_divided_model_has_the_bytes_of_a_whole_one(models, tmp_path, monkeypatch, way):
    how = {"steps": 6, "rates": (0.01, 0.001), **WAYS[way]}
    dtype = way if way == "bfloat16" else "float32"

    def asked(out):
        return replace(request(models, tmp_path / out, **how), dtype=dtype)

    train(asked("whole"), Alone())
    parts = replace(asked("parts"), divided=True)
    run = Directory(parts.run_uri)
    run.write(parts.stop, b"")
    with monkeypatch.context() as patch:
        seen = watched(Division, "divide", patch)
        by_two(parts, tmp_path)
    assert len(seen) == (1 if WAYS[way].get("loss") else 2)  # the student, and the teacher
    run.delete(parts.stop)
    assert found(tmp_path / "parts").course.step == 1
    with monkeypatch.context() as patch:
        stopping(3, patch)
        train(asked("parts"), Alone())
    assert found(tmp_path / "parts").course.step == 4
    by_two(parts, tmp_path)
    assert found(tmp_path / "parts").file.sha256 == found(tmp_path / "whole").file.sha256
    assert found(tmp_path / "parts").course == found(tmp_path / "whole").course
    assert found(tmp_path / "whole").course.best["step"] > 0
