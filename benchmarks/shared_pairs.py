"""What one set of rope pairs for all heads of a model costs: of q and k alone, and of the result.

Claim: on a trained Llama, half of the pairs of q and k, the same for all heads, costs at most 0.08
nats a token. Beside it: whole `narrow_heads` results, which also cut v and o to that width.

    .venv/bin/python benchmarks/shared_pairs.py
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from real_table import Row, measure
from result_file import Goal, Result, load_average, report, table
from safetensors.torch import load_file
from trained import SHARED, at_hand, stored, with_code_apart
from transformers import AutoModelForCausalLM

from actors.layer_units.damage import halved_layer
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_records
from planners.budget.served import pair_order

MODEL, GOAL = "llama-8m-ref", 0.08
SHARES = (1.0, 0.875, 0.75, 0.625, 0.5)
FRACTIONS = (0.9, 0.8, 0.7)
PROBE = 8  # sequences: the tokens of a run's probe
METHOD = """\
*q and k alone*: transformers' own model in float32; the rows of q_proj and k_proj of the other
pairs are set to zero, so that scores are those of the pairs kept; and with q of each head
multiplied as a run does it, so that these scores are closest to those of all pairs. The pairs are
those that a run chooses: the largest shares in the scores of the calibration tokens, over all heads
and layers.
*Results*: whole runs of MoDeGPT with `servable=narrow_heads` and other defaults, at a true size.
Losses are on the stored evaluation tokens, in nats a token above those of the dense model."""


def scales(model: Any, kept: list[int], probe: torch.Tensor) -> list[torch.Tensor]:
    """Return for each layer what a run multiplies q of each head by."""
    checkpoint = Checkpoint(str(SHARED / "models" / MODEL))
    hidden = model(probe, output_hidden_states=True).hidden_states
    return [
        halved_layer(
            checkpoint.read_layer(index), form, checkpoint=checkpoint, index=index, probe=inputs
        ).score_scales(inputs, kept)
        for index, (form, inputs) in enumerate(zip(checkpoint.form.layers, hidden, strict=False))
    ]


def zeroed(model: Any, kept: list[int]) -> None:
    """Set the rows of the other pairs to zero in q and k of every layer."""
    head_dim = model.config.head_dim
    half = head_dim // 2
    mask = torch.zeros(head_dim)
    for pair in kept:
        mask[pair] = mask[pair + half] = 1.0  # channels i and i + half rotate together
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            linear.weight.mul_(mask.repeat(linear.out_features // head_dim)[:, None])


def loss(model: Any, tokens: torch.Tensor) -> float:
    """Return the mean loss of the predicted tokens."""
    return float(sum(model(row[None], labels=row[None]).loss for row in tokens) / len(tokens))


@torch.inference_mode()
def alone(
    order: list[int], tokens: torch.Tensor, probe: torch.Tensor
) -> Iterator[tuple[int, float, float]]:
    """Yield pairs kept, and the loss where only q and k lose pairs: as they are, and scaled."""
    for share in SHARES:
        path = SHARED / "models" / MODEL
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        kept = sorted(order[: round(share * len(order))])
        factors = scales(model, kept, probe)
        zeroed(model, kept)
        plain = loss(model, tokens)
        for layer, each in zip(model.model.layers, factors, strict=True):
            by = each.repeat_interleave(model.config.head_dim)
            layer.self_attn.q_proj.weight.mul_(by[:, None])
        yield len(kept), plain, loss(model, tokens)


def results(work: Path) -> Iterator[tuple[float, dict[str, Any], Path]]:
    """Yield the fraction that was asked, the report and the folder of each run."""
    base = ""
    for fraction in FRACTIONS:
        row = Row(name="", method="modegpt", options={"servable": "narrow_heads"})
        given = {**stored(MODEL), **({"stats": base} if base else {"keep_statistics": True})}
        folder = work / f"{fraction}"
        got = measure(row, given, folder, keep_fraction=fraction)
        base = base or str(folder)
        yield fraction, got, folder


def main() -> None:
    """Measure, print and write the result."""
    load = load_average()
    if not at_hand(MODEL):
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for fraction, got, folder in results(Path(name)):
            said = got["evaluation"]
            nats = math.log(said["compressed"]["perplexity"] / said["dense"]["perplexity"])
            width = json.loads((folder / "model" / "config.json").read_text())["head_dim"]
            kept = got["parameters"]["keep_fraction"]
            rows.append((f"{fraction}", f"{kept:.4f}", f"{width}", f"{nats:+.3f}"))
        first = Directory(str(Path(name) / f"{FRACTIONS[0]}"))
        found = [record.values for record in read_records(first).values()]
    order = pair_order([values for values in found if "pair_scores" in values])
    calibration, evaluation = (
        next(iter(load_file(SHARED / "reference" / f"{MODEL}.{part}.safetensors").values())).long()
        for part in ("calibration", "evaluation")
    )
    (_, dense, _), *losses = alone(order, evaluation, calibration[:PROBE])
    half = losses[-1][2] - dense
    report(
        Result(
            claim="shared_pairs",
            method=METHOD,
            configuration={"model": MODEL, "pairs of a head": len(order), "order": str(order)},
            tables={
                "q and k alone:": table(
                    ("pairs kept", "as they are", "q multiplied"),
                    [
                        (f"{kept}", f"{plain - dense:+.3f}", f"{scaled - dense:+.3f}")
                        for kept, plain, scaled in losses
                    ],
                ),
                "Results:": table(("asked", "kept", "head_dim", "nats"), rows),
            },
            goals=[
                Goal(
                    text=f"half of the pairs of q and k: at most {GOAL} nats",
                    measured=f"{half:+.3f}",
                    met=half <= GOAL,
                )
            ],
            load=load,
        ),
        keep=True,
    )


if __name__ == "__main__":
    with_code_apart(main)
