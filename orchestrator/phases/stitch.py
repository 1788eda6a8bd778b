"""Make the layer files one Hugging Face checkpoint: write index and config, move no tensor."""

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from actors.messages import UnitDone
from actors.modeling.travelling import CODE, code_of
from actors.storage.checkpoint import INDEX
from actors.storage.contents import TAKEN_OVER, tokenizer_hash
from actors.storage.files import Directory, FileEntry
from actors.storage.tensors import TORCH_DTYPE
from orchestrator.phases.context import RunContext
from orchestrator.phases.stored import storage
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.prepare.model_config import least_transformers, result_config, stored
from orchestrator.report.numbers import NBSP, bytes_text
from orchestrator.report.serving import serving, serving_lines
from orchestrator.rundir.layout import RESULT
from planners.canonical_json import SCHEMA_VERSION, fingerprint, to_json
from planners.errors import ModelError
from planners.families import load as load_family
from planners.model.shape import ModelShape
from planners.model.weight_files import weight_files
from planners.units.kinds import KINDS
from planners.units.units import Unit


def stitch_unit(context: RunContext) -> Unit:
    """Return the unit whose fingerprint determines every byte of the result."""
    key = {
        "schema": SCHEMA_VERSION,
        "kind": "stitch",
        "inputs": [unit.fingerprint for unit in context.units],
        "code": code_hash(context.prepared.plan.shape),
    }
    names = tuple(unit.name for unit in context.units)
    return Unit(name="stitch", kind="stitch", index=-1, inputs=names, fingerprint=fingerprint(key))


def stitch(context: RunContext) -> None:
    """Write the files of the checkpoint that no unit writes: index, config, code, tokenizer."""
    unit = stitch_unit(context)
    if not context.ledger.todo([unit]):
        return
    with context.phase("stitch", total=1):
        started, begun = time.time(), time.monotonic()
        files = _write_model(context, RESULT, context.units)
        done = UnitDone(unit=unit.name, worker="driver", incarnation="", device="", files=files,
                        started=started, seconds=time.monotonic() - begun)  # fmt: skip
        context.ledger.commit(unit, done, attempt=1)
        context.journal.emit("stitch", unit=unit.name, worker="driver", start=started,
                             seconds=done.seconds)  # fmt: skip


def stitch_in(context: RunContext, folder: str, units: Sequence[Unit]) -> None:
    """Write index, config, code and tokenizer beside files of units in another folder."""
    _write_model(context, folder, units)


def stitched(context: RunContext) -> Subject:
    """Return the result as something to be evaluated."""
    identity = stitch_unit(context).fingerprint
    return Subject(name="compressed", uri=context.run.below("model"), identity=identity)


def _write_model(context: RunContext, folder: str, units: Sequence[Unit]) -> tuple[FileEntry, ...]:
    run, prepared = context.run, context.prepared
    plan, form, source = prepared.plan, context.form, Directory(prepared.model_uri)
    chain = [*prepared.former, prepared]
    compression = {
        "model": prepared.config.model,
        "revision": prepared.origin.revision,
        "method": " + ".join(step.spec.name for step in chain),
        "options": dict(prepared.options),
        "keep_fraction": context.parameters_after / plan.parameters_before,
        "parameters": [plan.parameters_before, context.parameters_after],
        "native": form.native,
        "version": metadata.version("compress-cluster"),
    }
    if form.is_quantised:
        found = storage(context)
        compression["bytes"] = [found["before"], found["after"]]
        compression["bits"] = round(found["bits"]["after"], 3)
    if not form.native:
        compression["requires"] = f"transformers>={least_transformers()}"
    if context.makers:
        compression["makers"] = to_json(context.makers)
    if prepared.former:
        compression["steps"] = [{**step.asked(), "options": dict(step.options)} for step in chain]
        del compression["options"]
    if folder == RESULT and (trained := _trained(context)):
        compression["recovery"] = trained
    files = [run.write(f"{folder}{INDEX}", _json(_index(context, units)))]
    new_config = stored({
        **result_config(prepared.model_config, plan.shape, form),
        "compression": compression,
    })  # fmt: skip
    files.append(run.write(f"{folder}config.json", _json(new_config)))
    if not form.native:
        files.append(run.write(f"{folder}{CODE}", code_of(plan.shape.model_type)))
    if tokenizer_hash(source) != prepared.tokenizer_hash:
        raise ModelError(
            f"{source.uri}: the tokenizer or generation_config.json has changed since this run "
            "started",
            hint="restore it and run the same command again; to use the model as it is now, give "
            "another --out",
        )
    present = [name for name in TAKEN_OVER if source.size(name) is not None]
    files += [run.write(f"{folder}{name}", source.read(name)) for name in present]
    files.append(run.write(f"{folder}README.md", _card(compression, new_config).encode()))
    return tuple(files)


def code_hash(shape: ModelShape) -> str:
    """Return the sha256 of the code that travels with the results of a model."""
    return hashlib.sha256(code_of(shape.model_type)).hexdigest()


def _index(context: RunContext, units: Sequence[Unit]) -> dict[str, Any]:
    """Return the index: the file of each tensor, and the bytes of all tensors without headers."""
    weight_map: dict[str, str] = {}
    total = 0
    names = weight_files(context.form)
    family = load_family(context.prepared.plan.shape.family)
    own = dict.fromkeys(
        (family.final_norm, family.norm_bias, family.head_shortcut, family.head_bias), "norm"
    )
    own[family.positions] = "positions"
    for unit in units:
        tensors = context.ledger.record(unit).values.get("tensors", {})
        assert isinstance(tensors, dict)  # written by our own units
        for name, tensor in tensors.items():
            weight_map[name] = names[own.get(name, part_of(unit))]
            total += math.prod(tensor["shape"]) * TORCH_DTYPE[tensor["dtype"]].itemsize
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _trained(context: RunContext) -> dict[str, Any] | None:
    """Return how the result was trained; None where it was not, or is as it was before."""
    how, units = context.prepared.recovery, context.recovering
    if how is None or units is None or not context.ledger.record(units.choice).values["used"]:
        return None
    return {
        "mode": how.mode,
        "loss": how.loss,
        "trains": how.trains,
        "data": context.prepared.config.recover.data,
        "tokens": how.tokens,
    }


def part_of(unit: Unit) -> str:
    """Return the part of the weights that a unit writes (see `weight_files`)."""
    kind = KINDS[unit.kind]
    if kind.of == "layer":
        return f"layer-{unit.index:05d}"
    return kind.stem.rpartition("-")[2]


def _card(compression: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    served = "\n".join(serving_lines(serving(config), "."))
    code = "" if compression["native"] else ", trust_remote_code=True"
    needs = "".join(f"\n{text}\n" for text in _needs(compression))
    tags = ", ".join(compression["method"].split(" + "))
    how = _options(compression) + _recovered(compression)
    return f"""---
library_name: transformers
tags: [compressed, {tags}]
---
# {compression["model"]}, compressed with {compression["method"]}

{_size(compression)}, made with compress-cluster {compression["version"]}.
{how} Revision of the original weights: `{compression["revision"]}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("."{code})
tokenizer = AutoTokenizer.from_pretrained(".")
```
{needs}
Engines that serve it, with `.` for this directory:

{served}

The licence of the original model applies to these weights.
"""


def _recovered(compression: Mapping[str, Any]) -> str:
    if "recovery" not in compression:
        return ""
    how = compression["recovery"]
    text = {"calibration": "the calibration data", "self": "text of the original model"}
    ways = {"local": "layer by layer to the outputs of the original layers"}
    way = ways.get(how["mode"], "as a whole to the logits of the original model")
    way = "on the text itself" if how["loss"] == "labels" else way
    return (
        f" Then trained {way}, on {how['tokens']:,} tokens of {text.get(how['data'], how['data'])}."
    )


def _size(compression: Mapping[str, Any]) -> str:
    before, after = compression["parameters"]
    kept = f"{after:,} parameters of {before:,} ({after / before:.1%}, true counts)"
    if "bytes" not in compression:
        return kept
    old, new = compression["bytes"]
    said = f"{bytes_text(new)} of weights instead of {bytes_text(old)} ({new / old:.1%})"
    said = said.replace(NBSP, " ") + f", {compression['bits']:g} bits a weight, scales included"
    return said if after >= before else f"{said}; {kept}"


def _needs(compression: Mapping[str, Any]) -> Iterator[str]:
    if "bytes" in compression:
        yield (
            "The weights are quantised, in a format that transformers reads with another package:\n"
            "`pip install compressed-tensors`."
        )
    if "requires" in compression:
        yield (
            f"This needs `{compression['requires']}`. `{CODE}` beside the weights holds the "
            "model's\n"
            "code, and runs only with `trust_remote_code=True`; without it loading the model "
            "fails.\n"
            "The tokenizer needs no code."
        )


def _options(compression: Mapping[str, Any]) -> str:
    def listed(options: Mapping[str, Any]) -> str:
        return ", ".join(f"{k}={v}" for k, v in options.items())

    if "steps" not in compression:
        return f"Options: {listed(compression['options'])}."
    lines = []
    for number, step in enumerate(compression["steps"], start=1):
        size = ", ".join(f"{k} {step[k]}" for k in ("keep_fraction", "slice") if k in step)
        lines.append(f"\n{number}. {step['method']}, {size}: {listed(step['options'])}")
    return "Steps, each with what is left of the input model after it:\n" + "".join(lines) + "\n\n"


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
