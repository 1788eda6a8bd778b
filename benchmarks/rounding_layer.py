"""One layer of Llama-2-70B's shapes is rounded to 4 bits: seconds, and memory against the plan.

Claim: a layer (hidden 8192, FFN 28672, 64 heads, 8 KV heads), random bfloat16 weights and the Gram
matrices of random inputs, is rounded by GPTQ in memory within 10 % of the plan's, and on one GPU in
the seconds that the table has; so all 80 layers of the model take that many on one card.

    .venv/bin/python benchmarks/rounding_layer.py [--device cuda] [--shrink N] [--quick]
"""

import argparse
import time
from typing import Any

import torch
from result_file import Goal, Result, load_average, report, table
from shaped import config_of

from actors.devices.memory import PeakMemory
from actors.methods.gptq import METHOD, SPEC
from actors.numerics.packed import packed
from planners.families import family_of
from planners.memory.peaks import rounding_peak
from planners.method import Target
from planners.model.cost import dense_start, layer_bytes, linear_dims, statistic_elements
from planners.model.form import LayerForm
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF, Statistic

MODEL, LAYERS = "llama-2-70b", 80
BYTES_GOAL = 0.10
SPREAD, TOKENS = 0.02, 4096
OPTIONS = {option.name: option.default for option in SPEC.options if option.default != ""}
METHOD_TEXT = """\
The tensor function of the method on one layer, as a worker calls it: factors of the Gram matrices
of its four inputs, search for scales, rounding, the errors that the record has, and packing. The
first call is not counted. Memory is the peak of the device above that of weights and Gram
matrices, beside the plan for the same."""


def layer_of(
    shape: ModelShape, form: LayerForm, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random weights of a layer by role, and the Gram matrices of random inputs."""
    generator = torch.Generator(device=device).manual_seed(0)
    weights, sums = {}, {}
    for role in shape.kind(form).roles:
        dims = linear_dims(shape, form, role)
        drawn = torch.randn(dims, generator=generator, device=device, dtype=torch.bfloat16)
        weights[f"{role}.weight"] = drawn * SPREAD
        name = f"{INPUT_OF[role]}.gram"
        if name not in sums:
            width = dims[1]
            x = torch.randn(TOKENS, width, generator=generator, device=device)
            x *= torch.rand(width, generator=generator, device=device) + 0.1
            sums[name] = packed((x.T @ x).to(torch.float64))
            del x
    return weights, sums


def main() -> None:
    """Measure on the device, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shrink", type=int, default=1, help="divides all widths [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="small widths; writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shrink = 16 if given.quick else given.shrink
    config = config_of(MODEL, num_layers=1, shrink=shrink, vocabulary=512)
    shape = family_of("llama").shape_of(config, "bfloat16")
    start = dense_start(shape)
    form = SPEC.form(shape, start, Target(), OPTIONS).layers[0]
    load = load_average()
    weights, sums = layer_of(shape, start.form.layers[0], given.device)
    seconds, peak = [], 0
    for _ in range(1 if given.device == "cpu" else 2):
        memory = PeakMemory(given.device)
        begun = time.monotonic()
        new, values = METHOD.compress(weights, sums, shape=shape, form=form, options=OPTIONS)
        if given.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - begun)
        peak = memory.bytes()
        del new
    planned = rounding_peak(shape, form) + layer_bytes(shape, form, width=2)
    grams = sum(
        8 * statistic_elements(shape, Statistic(tap, "gram")) for tap in {*INPUT_OF.values()}
    )
    best = min(seconds)
    errors = {name: f"{error:.4f}" for name, error in values["errors"].items()}
    card = f"CPU, {given.threads} threads"
    if given.device == "cuda":
        card = torch.cuda.get_device_name()
    report(
        Result(
            claim="rounding_layer" if shrink == 1 else f"rounding_layer_shrink{shrink}",
            method=METHOD_TEXT,
            configuration={
                "device": card,
                "shape": f"{MODEL}, widths over {shrink}",
                "options": dict(OPTIONS),
                "inputs": f"Gram matrices of {TOKENS} random tokens, {grams / 2**30:.2f} GiB",
            },
            tables={
                "One layer:": table(
                    ("device", "seconds", "80 layers, s", "peak, GiB", "plan, GiB"),
                    [(card, f"{best:.2f}", f"{best * LAYERS:.0f}", f"{peak / 2**30:.2f}",
                      f"{planned / 2**30:.2f}")],
                ),
                "Relative error of each linear:": table(("linear", "error"), list(errors.items())),
            },
            goals=[
                Goal(
                    text=f"peak within the plan and within {BYTES_GOAL:.0%} of it",
                    measured=f"{peak / planned:.2f} of the plan",
                    met=1 - BYTES_GOAL <= peak / planned <= 1,
                )
            ],
            load=load,
        ),
        keep=not given.quick,
    )  # fmt: skip


if __name__ == "__main__":
    main()
