"""Layer files -> one Hugging Face checkpoint: writes an index, moves no tensor."""

import hashlib
import json
import time
from collections.abc import Mapping
from importlib import metadata, resources
from typing import Any

from actors.messages import UnitDone
from actors.storage.checkpoint import INDEX
from actors.storage.files import Directory, FileEntry
from actors.storage.records import Record
from orchestrator.context import RunContext
from orchestrator.subjects import Subject
from planners.plan import SCHEMA_VERSION, ModelForm, ModelShape, fingerprint, to_json
from planners.units import Unit

CODE = "modeling_compressed.py"
AUTO_MAP = {
    "AutoConfig": "modeling_compressed.CompressedConfig",
    "AutoModel": "modeling_compressed.CompressedModel",
    "AutoModelForCausalLM": "modeling_compressed.CompressedForCausalLM",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def stitch_unit(context: RunContext) -> Unit:
    """Return the unit whose fingerprint stands for every byte of the result."""
    key = {
        "schema": SCHEMA_VERSION,
        "kind": "stitch",
        "inputs": [unit.fingerprint for unit in context.units],
        "code": hashlib.sha256(_code()).hexdigest(),
    }
    names = tuple(unit.name for unit in context.units)
    return Unit(name="stitch", kind="stitch", index=-1, inputs=names, fingerprint=fingerprint(key))


def stitch(context: RunContext) -> None:
    """Write everything of the checkpoint that is not a layer file."""
    unit = stitch_unit(context)
    if not context.ledger.todo([unit]):
        return
    with context.phase("stitch", total=1):
        started, begun = time.time(), time.monotonic()
        files = _write_model(context)
        done = UnitDone(unit=unit.name, worker="driver", incarnation="", device="", files=files,
                        started=started, seconds=time.monotonic() - begun)  # fmt: skip
        context.ledger.commit(unit, done, attempt=1)
        context.journal.tell("stitch", unit=unit.name, worker="driver", start=started,
                             seconds=done.seconds)  # fmt: skip


def stitched(context: RunContext) -> Subject:
    """Return the result as something to be evaluated."""
    identity = stitch_unit(context).fingerprint
    return Subject(name="compressed", uri=context.run.below("model"), identity=identity)


def _write_model(context: RunContext) -> tuple[FileEntry, ...]:
    run, prepared = context.run, context.prepared
    plan, form, source = prepared.plan, context.form, Directory(prepared.model_uri)
    compression = {
        "model": prepared.config.model,
        "revision": prepared.revision,
        "method": prepared.spec.name,
        "options": dict(prepared.options),
        "keep_fraction": context.parameters_after / plan.parameters_before,
        "parameters": [plan.parameters_before, context.parameters_after],
        "native": form.native,
        "version": metadata.version("compress-cluster"),
    }
    records = [context.ledger.record(unit) for unit in context.units]
    files = [run.write(f"model/{INDEX}", _json(_index(records)))]
    convert = _native_config if form.native else _remote_config
    new_config = {
        **convert(prepared.model_config, plan.shape, form),
        "compression": compression,
        "dtype": plan.shape.dtype,  # as stored; a config may say another
    }
    files.append(run.write("model/config.json", _json(new_config)))
    if not form.native:
        files.append(run.write(f"model/{CODE}", _code()))
    present = [name for name in TOKENIZER_FILES if source.size(name) is not None]
    files += [run.write(f"model/{name}", source.read(name)) for name in present]
    files.append(run.write("model/README.md", _card(compression).encode()))
    return tuple(files)


def _code() -> bytes:
    return resources.files("actors.modeling").joinpath(CODE).read_bytes()


def _index(records: list[Record]) -> dict[str, Any]:
    weight_map: dict[str, str] = {}
    total = 0
    for record in records:
        tensors = record.values.get("tensors", {})
        assert isinstance(tensors, dict)  # written by our own units
        weight_map |= {name: _file_of(name, record) for name in tensors}
        total += sum(file.bytes for file in record.files)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _file_of(tensor: str, record: Record) -> str:
    paths = [file.path.removeprefix("model/") for file in record.files]
    norm = [path for path in paths if path.startswith("norm")]
    if norm and tensor.endswith("norm.weight"):
        return norm[0]
    return paths[0]


def _native_config(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return the stock config of the narrower model; eps makes up for the narrower norm."""
    layer = form.layers[0]
    width = layer.residual_in
    return {
        **config,
        "hidden_size": width,
        "head_dim": shape.head_dim,
        "intermediate_size": layer.intermediate,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6) * shape.hidden / width,
        "tie_word_embeddings": form.tied,
    }


def _remote_config(config: Mapping[str, Any], shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if k not in ("architectures", "auto_map", "model_type")}
    windowed = shape.model_type != "qwen2" or config.get("use_sliding_window", False)
    return {
        **kept,
        "architectures": ["CompressedForCausalLM"],
        "auto_map": AUTO_MAP,
        "model_type": "compress_cluster",
        "compressed_from": shape.model_type,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "sliding_window": config.get("sliding_window") if windowed else None,
        "qkv_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        "tie_word_embeddings": form.tied,
        "embedding_dim": form.embedding_dim,
        "head_input_dim": form.head_dim,
        "head_norm_weight": form.head_norm_weight,
        "layer_forms": to_json(form.layers),
    }


def _card(compression: Mapping[str, Any]) -> str:
    before, after = compression["parameters"]
    code = "" if compression["native"] else ", trust_remote_code=True"
    options = ", ".join(f"{k}={v}" for k, v in compression["options"].items())
    return f"""---
library_name: transformers
tags: [compressed, {compression["method"]}]
---
# {compression["model"]}, compressed with {compression["method"]}

{after:,} parameters of {before:,} \
({after / before:.1%}, true counts), made with compress-cluster {compression["version"]}.
Options: {options}. Revision of the original weights: `{compression["revision"]}`.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("."{code})
tokenizer = AutoTokenizer.from_pretrained(".")
```

The licence of the original model applies to these weights.
"""


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
