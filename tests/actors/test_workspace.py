"""Factorisations hold what the plan says they hold: measured, at widths where a copy would show.

Measured in a process of its own: in that of the tests, what others left behind moves too.
"""

import ctypes
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from actors.devices import memory
from actors.devices.memory import PeakMemory, anonymous_bytes, release_freed_memory
from actors.methods.svdllm import METHOD
from actors.numerics.gram import accumulate
from actors.numerics.linalg import eigh_descending
from actors.numerics.low_rank import low_rank
from actors.numerics.nystrom import nystrom
from actors.numerics.packed import packed, zeros
from actors.storage.files import Directory
from actors.storage.tensors import map_tensors, write_tensors
from planners.catalogue import CONFIGS
from planners.families import family_of
from planners.memory.peaks import forward_bytes
from planners.memory.workspace import eigh_bytes, low_rank_bytes, nystrom_bytes
from planners.model.form import dense_form
from planners.model.packing import ROWS, packed_elements

MMAP_THRESHOLD = -3  # of malloc.h
SLACK = 24 * 2**20  # of libraries' own buffers and of what the allocator keeps

pytestmark = pytest.mark.skipif(not anonymous_bytes(), reason="the system does not tell memory")


def mapped_gram(dim, folder):
    """Return a packed gram in pages of a file, as a unit gets it."""
    x = torch.randn(200, dim, generator=torch.Generator().manual_seed(0)).double()
    matrix = x.T @ x
    matrix.diagonal().add_(1.0)
    directory = Directory(str(folder))
    file = write_tensors(directory, "stats.safetensors", {"gram": packed(matrix)})
    return map_tensors(directory, file)["gram"]


def watched(work):
    """Return the most memory that some work takes, its result included."""
    memory.SAMPLE_SECONDS = 0.001  # some moments are short here; this process is ours alone
    gc.collect()
    release_freed_memory()
    peak = PeakMemory()
    kept = work()
    found = peak.bytes()
    del kept
    return found


def prepare_to_measure():
    """Work on one thread, and have glibc return what is freed, as with the sizes of a large model.

    It keeps blocks of up to 32 MiB for later, which would be half of what is measured here.
    """
    torch.set_num_threads(1)
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is not None:
        choose(MMAP_THRESHOLD, 2**20)


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[..., int]]:
    """Return a function that measures some work in a process that does nothing else."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=prepare_to_measure) as pool:
        yield lambda work, *args: pool.submit(work, *args).result()


def nystrom_peak(dim, out_dim, folder):
    def work(dim):
        gram, weights = mapped_gram(dim, folder), torch.randn(dim, out_dim, dtype=torch.bfloat16)

        def shrunk():
            found = nystrom(gram, weights, ridge=1e-3, where="")
            return found.refit(dim // 2), found.relative_error(dim // 2)

        return shrunk

    work(256)()  # what libraries take once is not the work's
    return watched(work(dim))


def eigh_peak(dim, folder):
    def work(dim):
        gram = mapped_gram(dim, folder)
        return lambda: eigh_descending(gram, where="")

    work(256)()
    return watched(work(dim))


def attention_peak(qk_head_dim, vo_head_dim):
    generator = torch.Generator().manual_seed(0)

    def work(tokens):
        query, key, value = (
            torch.randn(4, 8, tokens, dim, generator=generator)
            for dim in (qk_head_dim, qk_head_dim, vo_head_dim)
        )
        return lambda: scaled_dot_product_attention(query, key, value, is_causal=True)

    work(16)()
    return watched(work(512))


def low_rank_peak(dim, out_dim, folder):
    def work(dim, out_dim):
        gram = mapped_gram(dim, folder)
        weight = torch.randn(out_dim, dim, dtype=torch.bfloat16)
        return lambda: low_rank(weight, gram, rank=min(dim, out_dim) // 2, where="")

    work(256, 300)()
    return watched(work(dim, out_dim))


def two_linears_peak(dim, out_dim, rank, folder):
    """Return the most memory beside the weights that two linears of a layer take."""

    def work(dim, out_dim, rank):
        gram = mapped_gram(dim, folder)
        weight = torch.randn(out_dim, dim, dtype=torch.bfloat16)
        weights = {"gate_proj.weight": weight, "up_proj.weight": weight}
        sizes = {**CONFIGS["llama-2-7b"], "hidden_size": dim, "intermediate_size": out_dim}
        shape = family_of("llama").shape_of(sizes, "bfloat16")
        form = replace(dense_form(shape), ranks={"gate_proj": rank, "up_proj": rank})
        sums = {"mlp_in.gram": gram}
        return lambda: METHOD.compress(weights, sums, shape=shape, form=form, options={})

    work(256, 300, 100)()
    return watched(work(dim, out_dim, rank))


def accumulation_peak(dim, tokens):
    total = zeros(dim, device="cpu").fill_(1.0)  # touched, hence there
    assert total.numel() == packed_elements(dim)
    x = torch.randn(tokens, dim)
    accumulate(zeros(256, device="cpu"), x[:, :256])
    return watched(lambda: accumulate(total, x))


def test_a_hidden_layer_is_factored_in_one_matrix_of_its_width(alone, tmp_path):
    dim, out_dim = 3072, 512
    found = alone(nystrom_peak, dim, out_dim, tmp_path)
    assert 8 * dim * dim <= found <= nystrom_bytes(dim, out_dim) + SLACK
    assert found < 2 * 8 * dim * dim + 8 * dim * out_dim  # not two, whatever is planned


def test_an_eigendecomposition_takes_four_matrices_of_its_width(alone, tmp_path):
    found = alone(eigh_peak, 1536, tmp_path)
    assert 8 * 2 * 1536**2 <= found <= eigh_bytes(1536) + SLACK


@pytest.mark.parametrize(("out_dim", "dim"), [(1024, 6144), (6144, 1024), (2304, 2304)])
def test_two_factors_of_a_weight_take_what_is_planned(alone, tmp_path, out_dim, dim):
    found, planned = (
        alone(low_rank_peak, dim, out_dim, tmp_path),
        low_rank_bytes(out_dim, dim, min(dim, out_dim) // 2),
    )
    # Short moments may pass between two samples, so the lower bound is a loose one.
    assert 0.55 * planned <= found <= planned + SLACK
    assert planned < 8 * 6144**2  # the gram of the wide side is never whole


def test_what_a_linear_took_is_given_back_before_the_next(alone, tmp_path):
    dim, out_dim, rank = 1024, 12288, 900
    found = alone(two_linears_peak, dim, out_dim, rank, tmp_path)
    factors = 2 * rank * (dim + out_dim)  # of one, in bfloat16
    assert found <= low_rank_bytes(out_dim, dim, rank) + 2 * factors + SLACK


def test_a_sum_is_added_without_a_product_of_its_size(alone):
    dim, tokens = 4096, 64
    found = alone(accumulation_peak, dim, tokens)
    assert found <= 4 * dim * (ROWS + tokens) + SLACK < 4 * dim * dim


@pytest.mark.parametrize(("qk_head_dim", "vo_head_dim"), [(12, 16), (16, 12), (16, 16)])
def test_attention_with_heads_of_two_widths_takes_the_scores_that_are_planned(
    alone, qk_head_dim, vo_head_dim
):
    measured = alone(attention_peak, qk_head_dim, vo_head_dim)
    shape = replace(family_of("llama").shape_of(CONFIGS["llama-2-7b"], "float32"), num_heads=8)
    form = replace(dense_form(shape), qk_head_dim=qk_head_dim, vo_head_dim=vo_head_dim)
    whole = replace(form, qk_head_dim=16, vo_head_dim=16)
    planned = [
        forward_bytes(
            replace(shape, hidden=1, intermediate=1, num_kv_heads=1), frozenset(),
            tokens=4 * 512, sequence_length=512, dtype="float32",
            form=replace(each, residual_in=1, residual_mid=1, residual_out=1, intermediate=1),
        )
        for each in (form, whole)
    ]  # fmt: skip
    scores = planned[0] - planned[1]
    assert abs(measured - scores) < 0.1 * scores + 6 * 2**20
    assert (scores > 64 * 2**20) == (qk_head_dim != vo_head_dim)
