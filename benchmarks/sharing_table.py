"""Layers that share tensors: DeltaLLM and Basis Sharing beside low rank, before and after recovery.

Claims, on a trained toy (`babyllama105`, dense 2.5470): the start that DeltaLLM publishes, for
layers 1 and 4 at rank 38, has perplexity 8.62; weighted by the inputs and aligned 3.60 at most,
with the number of the source fitted 3.26 at most, and within 1 % of low rank alone at the same
size. One epoch of recovery takes the published form to 3.10, the fitted one to 2.96, and `local`
the first to 3.30. To align a layer with another changes nothing.

Method: a whole run of the orchestrator for each row, in this process. Rows are kept in
``--folder``, so that the same command resumes.

    .venv/bin/python benchmarks/sharing_table.py [--folder DIR] [--only ROW ...]
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import recover_table
import torch
from recover_table import BY_HAND, LAYERS, RANK, Row
from result_file import Goal, Result, load_average, report, table
from safetensors.torch import load_file
from trained import SHARED, at_hand, stored

from actors.methods._alignment import aligned
from actors.modeling.outer_model import empty_model
from actors.storage.checkpoint import Checkpoint
from planners.families import load as load_family

TOY = "babyllama105"
BY = {"method": "deltallm", "options.layers": ",".join(map(str, LAYERS)), "options.rank": RANK}
PLAIN = {"options.c": "one", "options.weighted": False, "options.align": False}
PAPER, ONE, FIT = "delta, published", "delta, c=one", "delta, c=fit"
CUTS: dict[str, dict[str, Any]] = {
    PAPER: {**BY, **PLAIN},
    "delta, c=one, not aligned": {**BY, "options.c": "one", "options.align": False},
    ONE: {**BY, "options.c": "one"},
    FIT: BY,
    BY_HAND: recover_table.CUTS[BY_HAND],
    "shared as it is": {**BY, "options.rank": 0, "options.layers": "4", "keep_fraction": 0.9},
}
BUDGETS = {
    "SVD-LLM": {"method": "svdllm"},
    "delta, measured": {"method": "deltallm"},
    "shared basis": {"method": "basis_sharing"},
    "Tucker": {"method": "basis_sharing", "options.form": "tucker"},
    "CP": {"method": "basis_sharing", "options.form": "cp"},
    "MoDeGPT": {"method": "modegpt"},
}
KEEPS = (0.8, 0.7)
TRAINED = ("SVD-LLM", "delta, measured", "shared basis", "CP", "MoDeGPT")  # also recovered, at 0.8
for _name, _keys in BUDGETS.items():
    CUTS |= {f"{_name} {keep}": {**_keys, "keep_fraction": keep} for keep in KEEPS}
EXACT = 1e-4  # relative change of perplexity by alignment
METHOD = f"""\
A whole run of the orchestrator for each row, as in `recover_table`: one thread, float32; trained on
the 240 sequences of the calibration file that are not held out, 32 steps of 8 x 256 tokens, rates
by trials of 8 steps from 0.01 down until one is worse, trained is what the cut made. *Low rank*:
SVD-LLM at rank {RANK} for all linears of layers 1 and 4, set by hand. Rows with a fraction choose
ranks by it: SVD-LLM and shared factors one share for all linears, *delta, measured* and MoDeGPT by
measured damage. *Aligned*: the perplexity of the dense model with layers 1 and 4 aligned with those
before them, by transformers' own class in float32."""


def rows() -> list[Row]:
    """Return all rows, each cut first as it was cut."""
    local, whole = {"mode": "local"}, {"mode": "global"}
    found = []
    for cut in CUTS:
        found.append(Row(cut=cut, way="as cut"))
        if cut in (PAPER, ONE, FIT, BY_HAND, *(f"{name} 0.8" for name in TRAINED)):
            found.append(Row(cut=cut, way="global", recover=whole))
        if cut in (ONE, FIT, BY_HAND, "shared basis 0.8", "CP 0.8"):
            found.append(Row(cut=cut, way="local", recover=local))
        if cut in (ONE, FIT):
            found += [
                Row(cut=cut, way=f"global, replace={how}", recover={**whole, "replace": how})
                for how in ("linear", "constant")
            ]
    return found


def kept_or_measured(row: Row, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what is known of a row, from its file if an earlier call of this script made it."""
    path = folder / f"{row.name.replace(' ', '_').replace(',', '').replace('=', '-')}.json"
    if not path.is_file():
        found = recover_table.measure(row, keys, folder / path.stem, cuts=CUTS)
        shutil.rmtree(folder / path.stem)
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{row.name}: {found['perplexity']:.4f}, {found['seconds']['total']:.0f} s", flush=True)
    return dict(found)


@torch.inference_mode()
def aligned_perplexity() -> tuple[float, float]:
    """Return the perplexity of the dense model, and with layers aligned with those before them."""
    checkpoint = Checkpoint(str(SHARED / "models" / TOY))
    family, shape = load_family(checkpoint.shape.family), checkpoint.shape
    ids = load_file(SHARED / "reference" / f"{TOY}.evaluation.safetensors")["input_ids"]
    model = empty_model(checkpoint.config)
    tensors = {name: tensor.float() for name, tensor in checkpoint.stream_prefix("")}
    tensors.setdefault(family.head, tensors[family.embedding])

    def perplexity() -> float:
        model.load_state_dict(tensors, assign=True)
        nll = 0.0
        for part in torch.split(ids, 16):
            logits = model(input_ids=part).logits[:, :-1].double().flatten(0, 1)
            nll += float(
                torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum")
            )
        return float(torch.tensor(nll / (ids.numel() - len(ids))).exp())

    before = perplexity()
    for layer in LAYERS:
        own, source = (checkpoint.read_layer(index) for index in (layer, layer - 1))
        new, _ = aligned(own, source, {}, shape=shape, form=checkpoint.form.layers[layer])
        prefix = family.layer.format(i=layer)
        tensors |= {f"{prefix}.{family.below_layer(role)}": t.float() for role, t in new.items()}
    return before, perplexity()


Found = Mapping[str, Mapping[str, Any]]


def goals_of(found: Found, same: tuple[float, float]) -> list[Goal]:
    """Return what was to be shown."""

    def at(name: str) -> float:
        return float(found[name]["perplexity"])

    low_rank, fit = at(f"{BY_HAND}, as cut"), at(f"{FIT}, as cut")
    bars = [
        ("the published start: 8.57 to 8.67", f"{PAPER}, as cut", 8.67),
        ("weighted and aligned: at most 3.60", f"{ONE}, as cut", 3.60),
        ("with c=fit: at most 3.26", f"{FIT}, as cut", 3.26),
        ("global from c=one: at most 3.10", f"{ONE}, global", 3.10),
        ("global from c=fit: at most 2.96", f"{FIT}, global", 2.96),
        ("local from c=one: at most 3.30", f"{ONE}, local", 3.30),
    ]
    change = abs(same[1] / same[0] - 1)
    return [
        *(Goal(text=t, measured=f"{at(n):.4f}", met=at(n) <= most) for t, n, most in bars),
        Goal(
            text="c=fit: at most 1.01 times low rank of the same size",
            measured=f"{fit / low_rank:.4f} ({fit:.4f}, {low_rank:.4f})",
            met=fit <= 1.01 * low_rank,
        ),
        Goal(
            text=f"alignment alone leaves the perplexity equal to {EXACT:g}",
            measured=f"{same[0]:.6f} and {same[1]:.6f}",
            met=change < EXACT,
        ),
    ]


def tables_of(found: Found) -> dict[str, str]:
    """Return the rows as Markdown."""
    lines: list[Sequence[object]] = []
    for row in rows():
        one = found[row.name]
        how, start = one["recovery"], found[f"{row.cut}, as cut"]["perplexity"]
        trained = [f"{one['perplexity']:.4f}", recover_table.rate_of(how)] if how else ["-", "-"]
        lines.append((row.name, f"{one['kept']:.4f}", f"{start:.4f}", *trained,
                      f"{one['seconds'].get('recover', 0):.0f}" if how else "-"))  # fmt: skip
    columns = ("row", "kept", "as cut", "trained", "rate", "recover, s")
    dense = next(iter(found.values()))["dense"]
    return {f"Perplexity, dense {dense:.4f}:": table(columns, lines)}


def main() -> None:
    """Make every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where rows are kept [a temporary folder]")
    parser.add_argument("--only", nargs="+", help="make these rows, and no table")
    given = parser.parse_args()
    if not at_hand(TOY):
        return
    keys = stored(TOY) | {"threads": 1}
    load = load_average()
    with tempfile.TemporaryDirectory(prefix="sharing-table-") as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [r for r in rows() if not given.only or r.name in given.only]
        found = {row.name: kept_or_measured(row, keys, folder) for row in chosen}
    if given.only:
        return
    said = {k: str(v).replace(str(SHARED), "../shared") for k, v in keys.items()}
    report(
        Result(
            claim="sharing_table",
            method=METHOD,
            configuration={
                **said,
                **{cut: dict(own) for cut, own in CUTS.items()},
                **{f"recover, {row.way}": dict(row.recover) for row in rows() if row.recover},
            },
            tables=tables_of(found),
            goals=goals_of(found, aligned_perplexity()),
            load=load,
        ),
        keep=True,
    )


if __name__ == "__main__":
    main()
