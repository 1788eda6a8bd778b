"""A pass, weights or a result that float16 cannot hold: said as that, with a dtype that can."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.messages import StepDone, VerifyRequest
from actors.storage.tensors import described
from actors.worker.evaluator import Evaluator
from orchestrator.phases.evaluate import _part_done
from planners.errors import NumericsError
from planners.units.units import Unit
from tests.builders import compress_local, save_model

# The product of the two leaves float16's range; neither they nor what is between them do.
LARGE = ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight")
IDS = [[1, 5, 9, 12], [7, 7, 0, 2]]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A sound float32 model whose activations are beyond 65504."""
    folder = save_model(tmp_path_factory.mktemp("large") / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in LARGE:
        tensors[name] *= 5e3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("slicegpt", {}, marks=pytest.mark.nightly),
        ("svdllm", {}),
        pytest.param("modegpt", {}, marks=pytest.mark.nightly),
        ("modegpt", {"allocation": "influence"}),
    ],
)
def test_a_calibration_pass_that_overflows_names_float16_and_the_key(
    large, tmp_path, method, options
):
    recipe = {"method": method, "options": options, "keep_fraction": 0.9}
    with pytest.raises(NumericsError, match="the calibration pass was in float16, whose") as error:
        compress_local(large, tmp_path / "run", calibration_dtype="float16", **recipe)
    assert "--calibration-dtype float32, or bfloat16" in error.value.hint


@pytest.mark.nightly
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtypes_that_are_named_hold_it(large, tmp_path, dtype):
    found = compress_local(large, tmp_path / "run", calibration_dtype=dtype, method="svdllm",
                           keep_fraction=0.9)  # fmt: skip
    assert math.isfinite(found["compressed"])


def test_a_result_that_overflows_names_its_dtype():
    with pytest.raises(NumericsError, match="NaN or infinite in float16, whose largest") as error:
        described(torch.tensor([1.0, 1e6]).half())
    assert "use the model in bfloat16 or float32" in error.value.hint
    with pytest.raises(NumericsError, match=r"NaN or infinite$"):
        described(torch.tensor([math.inf]))


def test_a_loss_that_overflows_names_its_dtype():
    unit = Unit(name="evaluation-dense-part-00000", kind="evaluate", index=0, inputs=(),
                fingerprint="")  # fmt: skip
    done = StepDone(index=0, incarnation="", num_tokens=4, started=0.0, seconds=0.0, peak_bytes=0,
                    nats=math.nan, num_predicted=3, boundary=None)  # fmt: skip
    with pytest.raises(NumericsError, match="not a finite number in float16, whose") as error:
        _part_done(unit, done, "float16")
    assert "use the model in bfloat16 or float32" in error.value.hint
    with pytest.raises(NumericsError, match=r"not a finite number$"):
        _part_done(unit, done, "bfloat16")


def test_a_result_whose_logits_overflow_as_users_load_it_is_said_to_be_float16(large, tmp_path):
    folder = shutil.copytree(large, tmp_path / "half")
    halves = {n: t.half() for n, t in load_file(folder / "model.safetensors").items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    tensors = {name: described(tensor) for name, tensor in halves.items()}
    request = VerifyRequest(uri=str(folder), family="llama", tensors=tensors, ids=IDS, whole=True)
    checks = Evaluator(1, "cpu").verify("verify", request).values["checks"]
    (finite,) = [check for check in checks if check["name"] == "logits are finite"]
    assert not finite["passed"]
    assert "float16, whose largest number is 65504" in finite["detail"]
