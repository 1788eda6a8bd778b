"""What only a CUDA device can show; skipped, with the reason, where there is none."""

import pytest
import torch

from actors.devices.memory import PeakMemory
from actors.devices.transfer import to_device, to_host
from actors.messages import ThroughputRequest, pack, unpack
from actors.numerics.gram import accumulate
from actors.numerics.packed import zeros
from actors.storage.files import Directory
from actors.storage.tensors import read_header, read_tensor, write_tensors
from actors.worker.attention_kernels import AttentionKernels
from actors.worker.timing import Generation, Setting
from planners.model.packing import ROWS
from planners.timing import COMPILED, GRAPHS
from tests.builders import perplexity, run_local, save_model
from tests.families.test_result_code import narrow_result
from tests.families.tiny import config_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
SIZES = {
    "slicegpt": {"slice": 0.25},
    "modegpt": {"keep_fraction": 0.8},
    "svdllm": {"keep_fraction": 0.8},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_goes_to_a_device_comes_back(dtype):
    tensor = (torch.arange(12) - 5).reshape(3, 4).to(dtype)
    there = to_device(tensor, "cuda")
    assert there.is_cuda
    assert torch.equal(to_host(there), tensor)
    assert torch.equal(unpack(pack(there), device="cpu"), tensor)


def test_what_is_read_for_a_device_is_read_into_memory_that_it_copies_from(tmp_path):
    directory, tensor = Directory(str(tmp_path)), torch.linspace(0, 1, 12).reshape(3, 4)
    write_tensors(directory, "w.safetensors", {"w": tensor})
    entry = read_header(directory, "w.safetensors")["w"]
    found = read_tensor(directory, "w.safetensors", entry, device="cuda")
    assert found.is_pinned()
    assert torch.equal(to_host(to_device(found, "cuda")), tensor)


def test_a_dtype_is_reached_on_the_device():
    tensor = torch.linspace(0, 1, 7)
    assert torch.equal(to_host(to_device(tensor, "cuda", torch.bfloat16)), tensor.bfloat16())


def test_the_peak_is_that_of_the_device():
    peak = PeakMemory("cuda")
    held = torch.ones(2**22, device="cuda")
    del held
    assert 2**24 <= peak.bytes() < 2**25


@pytest.mark.parametrize("method", SIZES)
def test_a_run_on_a_device_loses_what_one_on_the_cpu_loses(method, tmp_path):
    model = save_model(tmp_path / "model")
    for device in ("cpu", "cuda"):
        report = run_local(model, tmp_path / device, method=method, device=device, **SIZES[method])
        assert report["verdict"] == "READY"
    for name in ("dense", "compressed"):
        on_cpu, on_device = (perplexity(tmp_path / d, name) for d in ("cpu", "cuda"))
        assert on_device == pytest.approx(on_cpu, rel=1e-3)


def test_a_gram_is_summed_as_on_a_cpu():
    x = torch.randn(300, 5 * ROWS + 8).bfloat16()
    sums = [zeros(x.shape[1], device=device) for device in ("cpu", "cuda")]
    for total in sums:
        accumulate(total, x.to(total.device))
    torch.testing.assert_close(sums[1].cpu(), sums[0], rtol=1e-5, atol=1e-4)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("mode", [GRAPHS, COMPILED])
@torch.no_grad()
def test_a_step_that_is_recorded_or_compiled_gives_the_tokens_of_the_model_as_it_is(mode):
    model = narrow_result(config_of("llama"))[0].to("cuda")
    request = ThroughputRequest(uris={}, prompt=8, batches=(2,), new_tokens=6)
    expected = Generation(model, request, Setting(batch=2)).tokens()
    other = Generation(model, request, Setting(batch=2, mode=mode))
    other.prepare()
    for _ in range(3):  # compiled, recorded by torch, replayed
        assert torch.equal(other.tokens(), expected)


@pytest.mark.parametrize(("qk", "vo", "fused"), [(128, 128, True), (96, 88, True), (90, 91, False)])
def test_a_device_has_fused_kernels_for_multiples_of_8(qk, vo, fused):
    query, key, value = (
        torch.randn(1, 4, 256, width, dtype=torch.bfloat16, device="cuda") for width in (qk, qk, vo)
    )
    with AttentionKernels() as noted:
        torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert (noted.names != ["math"]) == fused
