"""A layer of Llama-2-70B's shapes on a GPU: forward and grams against the same products run bare.

Claim: the forward pass of a layer with all its grams reaches 60 % of the rate of the same products
run bare on the same card, in each dtype; how long each factorisation takes; and from both the
hours of one card for the whole model at 25 %, next to the 3.5 h on an H100 that SliceGPT published.
Without a GPU the script says what it would do.

    .venv/bin/python benchmarks/gpu_layer.py [--tokens N] [--quick]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from result_file import Goal, Result, load_average, report, table
from shaped import config_of

from actors.modeling.outer_model import OuterModel
from actors.numerics.gram import accumulate
from actors.numerics.linalg import cholesky_psd, eigh_descending
from actors.numerics.packed import zeros
from actors.statistics.observe import LayerStatistics
from planners.families import family_of
from planners.families import load as load_family
from planners.model.cost import forward_flops, gram_flops, linear_dims
from planners.model.form import dense_form
from planners.model.layer import ROLES
from planners.model.packing import blocks_of
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

GOAL = 0.6
MODEL, LAYERS, SEQUENCE = "llama-2-70b", 80, 2048
PUBLISHED_HOURS, PUBLISHED_TOKENS = 3.5, 1024 * SEQUENCE
DTYPES = (torch.bfloat16, torch.float32)
TAPS = ("resid_attn", "resid_mlp", "mlp_hidden")
REPEATS = 5


def main() -> None:
    """Measure on the GPU at hand, or say what would be measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192, help="a microbatch [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="an eighth of the widths, no file")
    given = parser.parse_args()
    config = config_of(MODEL, num_layers=1, shrink=8 if given.quick else 1, vocabulary=512)
    shape = family_of("llama").shape_of(config, "bfloat16")
    if not torch.cuda.is_available():
        print(_would_do(shape, given.tokens))
        return
    load = load_average()
    rows, ratios = [], {}
    for dtype in DTYPES:
        ours, bare, flops = layer_rates(config, shape, given.tokens, dtype)
        name = str(dtype).removeprefix("torch.")
        ratios[name] = bare / ours
        rate = [f"{flops / seconds / 1e12:.1f}" for seconds in (ours, bare)]
        rows.append((name, f"{ours:.4f}", f"{bare:.4f}", *rate, f"{bare / ours:.3f}"))
        if dtype == torch.bfloat16:
            pass_seconds = ours * LAYERS * PUBLISHED_TOKENS / given.tokens
    factors = _factorisations(shape)
    sites = 2 * LAYERS + 1
    hours = (pass_seconds + sites * factors[f"eigh {shape.hidden}"]) / 3600
    columns = ("dtype", "layer, s", "bare, s", "layer, TFLOP/s", "bare, TFLOP/s", "of bare")
    report(
        Result(
            claim="gpu_layer",
            method="One layer by the stage's own hooks, grams of "
            f"{', '.join(TAPS)}; bare: the same matrix products and attention, one after the "
            f"other, on tensors that are there. Medians of {REPEATS} after one for warmth.",
            configuration={
                "card": torch.cuda.get_device_name(),
                "tokens": f"{given.tokens} in sequences of {SEQUENCE}",
                "shape": str(shape),
            },
            tables={
                "A microbatch:": table(columns, rows),
                "Factorisations, seconds:": table(
                    ("", "seconds"), [(k, f"{v:.2f}") for k, v in factors.items()]
                ),
            },
            goals=[
                Goal(
                    text=f"{name}: at least {GOAL:.0%} of bare",
                    measured=f"{ratio:.3f}",
                    met=ratio >= GOAL,
                )
                for name, ratio in ratios.items()
            ],
            notes=[
                f"Projected for SliceGPT of {MODEL} with {PUBLISHED_TOKENS:,} tokens: {hours:.2f} h"
                f" of this card for the pass and the factorisations; published: {PUBLISHED_HOURS} h"
                " of an H100, everything included."
            ],
            load=load,
        ),
        keep=not given.quick,
    )


def _would_do(shape: ModelShape, tokens: int) -> str:
    flops = forward_flops(shape, tokens=tokens, sequence_length=SEQUENCE)
    grams = gram_flops(shape, _statistics(), tokens=tokens)
    return (
        "no GPU here. On one this would time, in bfloat16 and in float32:\n"
        f"- {tokens} tokens through one layer with hidden {shape.hidden} and FFN "
        f"{shape.intermediate}: {flops / 1e12:.1f} TFLOP, and its grams of {', '.join(TAPS)}: "
        f"{grams / 1e12:.1f} TFLOP, against the same products run bare;\n"
        f"- an eigendecomposition of {shape.hidden} x {shape.hidden}, and Cholesky factors of "
        f"{shape.hidden} x {shape.hidden} and {shape.intermediate} x {shape.intermediate};\n"
        f"- and project the hours of one card for {MODEL}, published: {PUBLISHED_HOURS} h of an "
        "H100."
    )


def _statistics() -> frozenset[Statistic]:
    return frozenset(Statistic(tap, "gram") for tap in TAPS)


def layer_rates(
    config: dict[str, Any],
    shape: ModelShape,
    tokens: int,
    dtype: torch.dtype,
    *,
    device: str = "cuda",
) -> tuple[float, float, int]:
    """Return seconds of a layer with grams, of the same products bare, and their operations."""
    family = load_family("llama")
    outer = OuterModel(config, family, dtype=dtype, device=device)
    named = family.layer_tensors(shape, 0)
    prefix = family.layer.format(i=0) + "."
    weights = {
        name.removeprefix(prefix): torch.randn(dims, device=device, dtype=dtype) * 0.02
        for name, dims in named.values()
    }
    layer = outer.layer(0, weights)
    held = LayerStatistics(_statistics(), shape, family, device=device)
    hidden = torch.randn(tokens // SEQUENCE, SEQUENCE, shape.hidden, device=device, dtype=dtype)
    arguments = outer.layer_arguments(hidden)[0]

    def ours() -> None:
        held.attach(layer)
        after = layer(hidden, **arguments)
        held.detach()
        held.update_residual(hidden, after)

    flops = forward_flops(shape, tokens=tokens, sequence_length=SEQUENCE)
    flops += gram_flops(shape, _statistics(), tokens=tokens)
    return _seconds(ours), _seconds(_bare(shape, hidden, dtype)), flops


def _bare(shape: ModelShape, hidden: torch.Tensor, dtype: torch.dtype) -> Callable[[], None]:
    flat = hidden.flatten(0, 1)
    inputs = {shape.hidden: flat}
    weights = []
    for name in ROLES:
        out_dim, in_dim = linear_dims(shape, dense_form(shape), name)
        weights.append(torch.randn(out_dim, in_dim, device=hidden.device, dtype=dtype))
        if in_dim not in inputs:
            inputs[in_dim] = torch.randn(len(flat), in_dim, device=hidden.device, dtype=dtype)
    heads = (hidden.shape[0], shape.num_heads, SEQUENCE, shape.head_dim)
    q = torch.randn(heads, device=hidden.device, dtype=dtype)
    attention = torch.nn.functional.scaled_dot_product_attention

    def work() -> None:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T
        attention(q, q, q, is_causal=True)
        for x in (flat, flat, inputs[shape.intermediate]):
            for block in blocks_of(x.shape[1]):  # half of the square, as ours
                left, right = x[:, block.first : block.last].T, x[:, block.first :]
                if dtype == torch.float32 or not x.is_cuda:
                    left.float() @ right.float()
                else:
                    torch.mm(left, right, out_dtype=torch.float32)

    return work


def _factorisations(shape: ModelShape) -> dict[str, float]:
    """Return name -> seconds of each, on the card."""
    found = {}
    for dim in (shape.hidden, shape.intermediate):
        gram = zeros(dim, device="cuda")
        for _ in range(4):  # enough rows that the ridge alone does not hold it
            x = torch.randn(dim // 2, dim, device="cuda")
            accumulate(gram, x)
        found[f"cholesky {dim}"] = _seconds(
            lambda gram=gram: cholesky_psd(gram, ridge=1e-3, where="here"), repeats=1
        )
        if dim == shape.hidden:
            found[f"eigh {dim}"] = _seconds(
                lambda gram=gram: eigh_descending(gram, where="here"), repeats=1
            )
    return found


@torch.inference_mode()
def _seconds(work: Callable[[], object], *, repeats: int = REPEATS) -> float:
    """Return the median seconds, the card's queue drained before and after."""
    work()
    spent = []
    for _ in range(repeats):
        _drain()
        begun = time.perf_counter()
        work()
        _drain()
        spent.append(time.perf_counter() - begun)
    return sorted(spent)[len(spent) // 2]


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
