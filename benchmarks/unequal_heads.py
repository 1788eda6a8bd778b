"""On a CPU, prompts pass heads of unequal widths faster if zeros make them equally wide.

Claim: with v/o heads narrower or wider than q/k, a result takes prompts of 256 tokens and more
faster than without the zeros, at every width (the interval of the ratio excludes 1), shorter ones
no slower, and its logits agree to 1e-4; decoding is not touched.

    .venv/bin/python benchmarks/unequal_heads.py [--quick]
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from result_file import Goal, Result, load_average, report, table
from transformers import AutoConfig

from actors.modeling.travelling import classes
from orchestrator.prepare.model_config import result_config, stored
from planners.families import family_of
from planners.model.cost import dense_model_form
from planners.timing import median_interval

SAME, THREADS, ROUNDS = 1e-4, 1, 15
LONG = 256  # tokens
MODEL = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 2048,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = ((64, 48), (48, 64), (56, 40))  # q/k, v/o
SETTINGS = ((1, 128), (4, 256), (2, 512))  # batch, tokens of a prompt
METHOD = """\
A random Llama with narrower heads, float32, one thread. Two copies of the result's own class with
the same weights: one as it is, one that never widens heads (`_needs_one_width` gives False), so
that torch computes attention without its fused kernel. Both take the same prompts in turn in one
process, first the one and then the other in even rounds, the other way round in odd ones, after a
round that does not count. Seconds are those of the processor, so that what else runs on the machine
counts little. Ratios are of one round; the interval is that of their
median with a confidence of 95 %."""


def result_of(qk: int, vo: int, *, widened: bool) -> Any:
    """Return a random result whose heads have these widths."""
    config = AutoConfig.for_model("llama", **MODEL)
    shape = family_of("llama").shape_of(config.to_dict(), "float32")
    dense = dense_model_form(shape)
    layers = tuple(replace(each, qk_head_dim=qk, vo_head_dim=vo) for each in dense.layers)
    form = replace(dense, layers=layers, native=False)
    code = classes("llama")
    torch.manual_seed(0)
    written = stored(result_config(config.to_dict(), shape, form))
    kept: Mapping[str, Any] = {key: value for key, value in written.items() if key != "dtype"}
    model = code.CompressedForCausalLM(code.CompressedConfig(**kept)).eval()
    if not widened:
        for layer in model.model.layers:
            layer.self_attn._needs_one_width = lambda _: False
    return model


def seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the processor's seconds of one pass over prompts."""
    begun = time.process_time()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.process_time() - begun


@torch.no_grad()
def main() -> None:
    """Measure both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds; writes nothing")
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    load, rows, worst = load_average(), [], 0.0
    ratios: dict[bool, list[float]] = {True: [], False: []}  # long prompts, short ones
    for qk, vo in HEADS:
        models = [result_of(qk, vo, widened=widened) for widened in (True, False)]
        for batch, tokens in SETTINGS:
            ids = torch.randint(0, MODEL["vocab_size"], (batch, tokens))
            ours, plain = (model(ids).logits for model in models)
            off = float((ours - plain).abs().max() / plain.abs().max())
            found: list[list[float]] = [[], []]
            for number in range(1 + (6 if given.quick else ROUNDS)):
                for which in (0, 1) if number % 2 == 0 else (1, 0):
                    found[which].append(seconds(models[which], ids))
            each = [slow / fast for fast, slow in zip(*(f[1:] for f in found), strict=True)]
            low, high = median_interval(each)
            ratio, worst = statistics.median(each), max(worst, off)
            ratios[tokens >= LONG].append(low if tokens >= LONG else ratio)
            rows.append((
                f"{qk} / {vo}", str(batch), str(tokens),
                *(f"{1e3 * statistics.median(f[1:]):.1f} ms" for f in reversed(found)),
                f"{ratio:.2f} ({low:.2f} to {high:.2f})", f"{off:.0e}",
            ))  # fmt: skip
    columns = ("q/k / v/o", "batch", "tokens", "as they are", "widened", "ratio", "logits differ")
    report(
        Result(
            claim="unequal_heads",
            method=METHOD,
            configuration={**MODEL, "threads": THREADS, "rounds": ROUNDS, "dtype": "float32"},
            tables={"Seconds of a pass over prompts:": table(columns, rows)},
            goals=[
                Goal(
                    text=f"prompts of {LONG} tokens and more are faster at every width",
                    measured=f"lowest end of an interval {min(ratios[True]):.2f}",
                    met=min(ratios[True]) > 1,
                ),
                Goal(
                    text="shorter ones no slower",
                    measured=f"lowest ratio {min(ratios[False]):.2f}",
                    met=min(ratios[False]) >= 1,
                ),
                Goal(
                    text=f"the same logits to {SAME:g} of the largest",
                    measured=f"{worst:.0e}",
                    met=worst <= SAME,
                ),
            ],
            load=load,
        ),
        keep=not given.quick,
    )


if __name__ == "__main__":
    main()
