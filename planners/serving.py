"""Which engine serves which result, with what command; and the form that two engines share, deci.

An engine is a row of `ENGINES`. All that is known of a result is its ``config.json``, so the same
rows answer for a run, for an export and for a model made elsewhere. What engines do was read in
their sources and tried where they install; see docs/serving.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from planners.errors import ConfigError
from planners.model.blocks import block_type
from planners.model.form import ModelForm, dense_form
from planners.model.scheme import INT, WHOLE_ROW, Scheme, scheme_of
from planners.model.shape import ModelShape

Config = Mapping[str, Any]

# Head widths of vLLM's FlashAttention kernels: FlashAttentionBackend.get_supported_head_sizes in
# vllm/v1/attention/backends/flash_attn.py. Its FlashInfer kernels have 64, 128 and 256 of these.
VLLM_HEAD_DIMS: tuple[int, ...] = (32, 64, 96, 128, 160, 192, 224, 256)

# Read in vLLM's sources, autumn 2026; see docs/serving.md.
MARLIN_BITS = (4, 8)
MARLIN_GROUPS = (WHOLE_ROW, 32, 64, 128)
MARLIN_MULTIPLE = 64  # of a width; others are padded when a model is loaded
EMBEDDINGS = ("embed_tokens", "wte", "embed_in")  # endings of their names
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

DECI_MULTIPLE = 256  # both engines round the width of a deci layer up to it
DECI_CLASS = "DeciLMForCausalLM"
DECI_EXPORT = "compress-cluster export RUN --format deci"
DECI_OTHERWISE = (
    "compress with --option modules=mlp --multiple-of 256, which leaves attention whole; such a "
    "result can be exported"
)

QUANTISED = "quantization_config"  # of a config whose matrices are quantised

BLOCKS_EXAMPLE = "examples/quantised_to_gguf.py"

# Classes of results that llama.cpp's converter registers.
CONVERTED = frozenset({
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "GemmaForCausalLM", "GraniteForCausalLM", "CohereForCausalLM", "Cohere2ForCausalLM",
    "PhiForCausalLM", "Starcoder2ForCausalLM", "SmolLM3ForCausalLM", "SeedOssForCausalLM",
    "Ernie4_5ForCausalLM", DECI_CLASS,
})  # fmt: skip
# Of these, the ones whose rope reads a table of factors.
NARROW_CONVERTED = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What an engine does with a result.

    Attributes:
        engine: its name.
        command: loads the result, which is at ``{path}``; empty if the engine does not take it.
        note: why not, or what to know.
    """

    engine: str
    command: str = ""
    note: str = ""


def served(config: Config) -> tuple[Served, ...]:
    """Return what each engine does with the result of this ``config.json``."""
    answers = {name: answer(config) for name, answer in ENGINES.items()}
    schemes = _schemes(config)
    for name, answer in OF_QUANTISED.items() if schemes else ():
        if answers[name].get("command"):
            answers[name] = _both(answers[name], answer(config, schemes))
    return tuple(Served(engine=name, **answer) for name, answer in answers.items())


def _schemes(config: Config) -> dict[str, Scheme]:
    """Return module, by its full name -> scheme; empty if nothing is quantised."""
    groups = config.get(QUANTISED, {}).get("config_groups", {}).values()
    return {name: scheme_of(group["weights"]) for group in groups for name in group["targets"]}


def _both(answer: dict[str, str], more: dict[str, str]) -> dict[str, str]:
    """Return an answer to which what quantisation changes of it is added."""
    if more.get("refused"):
        return {"note": more["refused"]}
    notes = [note for note in (answer.get("note"), more.get("note")) if note]
    return {**answer, "note": "; ".join(notes)}


def _transformers(config: Config) -> dict[str, str]:
    if _is_deci(config):
        return {"note": "it has no class for this form; load the result that it was made from"}
    code = ", trust_remote_code=True" if _is_remote(config) else ""
    return {"command": f'AutoModelForCausalLM.from_pretrained("{{path}}"{code})'}


def _vllm(config: Config) -> dict[str, str]:
    if _is_deci(config):
        note = "the code that it runs is a config class"
        return {"command": "vllm serve {path} --trust-remote-code", "note": note}
    if not _is_remote(config):
        return {"command": "vllm serve {path}", "note": _kernels(_head_dim(config))}
    why = _not_one_width(config) or _kernels(_head_dim(config))
    if why:
        return {"note": why}
    return {"command": "vllm serve {path} --trust-remote-code --model-impl transformers"}


def _sglang(config: Config) -> dict[str, str]:
    if _is_deci(config):
        return {"note": "not tried"}
    command = "python -m sglang.launch_server --model-path {path}"
    if not _is_remote(config):
        return {"command": command}
    why = _not_one_width(config)
    if why:
        return {"note": why}
    return {"command": f"{command} --trust-remote-code --model-impl transformers"}


def _not_one_width(config: Config) -> str:
    """Return why an engine that fills our code and puts its own attention into it cannot."""
    layers, dim, hidden = config["layer_forms"], _head_dim(config), config["hidden_size"]
    if any(each.get("links") for each in layers):
        return "it fills every tensor from the files, and layers of this result share some"
    if any({each["qk_head_dim"], each["vo_head_dim"]} != {dim} for each in layers):
        return "its attention has the head width of the original model, and this result others"
    # A layer whose blocks both read its input has no stream between them.
    streams = {each[key] or hidden for each in layers
               for key in ("residual_in", "residual_mid", "residual_out")}  # fmt: skip
    if streams != {hidden} or config["head_shortcut"]:
        return "its embedding has the width of the original model, and this result's is narrower"
    return ""


def _llama_cpp(config: Config) -> dict[str, str]:
    if _is_remote(config):
        fits = _fits_deci(config) and not (QUANTISED in config and _not_held(config))
        other = f"; {DECI_EXPORT} writes one that it takes" if fits else ""
        return {"note": f"its format has no such layers{other}"}
    (name,) = config["architectures"]
    if name not in CONVERTED:
        return {"note": f"its converter does not know {name}"}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "longrope" and not (QUANTISED in config and name in NARROW_CONVERTED):
        other = "; examples/narrow_heads_to_gguf.py writes them" * (name in NARROW_CONVERTED)
        return {"note": f"its converter drops the factors of longrope{other}"}
    if _is_deci(config):
        if kind not in ("default", "llama3"):
            return {"note": f"its converter drops {kind} rope from this form"}
        if _head_dim(config) * config["num_attention_heads"] != config["hidden_size"]:
            return {"note": "its converter takes hidden_size / num_attention_heads for head_dim"}
    if QUANTISED in config:
        why = _not_held(config)
        return {"note": why} if why else {
            "command": f"python {BLOCKS_EXAMPLE} LLAMA_CPP {{path}} --outfile model.gguf && "
            "llama-server -m model.gguf",
            "note": "LLAMA_CPP is its checkout",
        }  # fmt: skip
    return {"command": "python convert_hf_to_gguf.py {path} --outfile model.gguf && "
            "llama-server -m model.gguf"}  # fmt: skip


def _not_held(config: Config) -> str:
    """Return why no type of llama.cpp holds what is quantised as it is; empty if one does."""
    widths = [config["hidden_size"], _head_dim(config) * config["num_attention_heads"],
              *_ffn_widths(config)]  # fmt: skip
    for scheme in sorted(set(_schemes(config).values())):
        if not all(block_type(scheme, width) for width in widths):
            return (f"none of its types holds {scheme} exactly; give its own quantiser the model "
                    "as it was before it was quantised")  # fmt: skip
    return ""


ENGINES: Mapping[str, Callable[[Config], dict[str, str]]] = {
    "transformers": _transformers,
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
}


def no_kernel(scheme: Scheme) -> str:
    """Return why no kernel of vLLM takes matrices of a scheme; empty if one does."""
    if scheme.grid == INT and not scheme.symmetric and scheme.bits not in MARLIN_BITS:
        return f"its kernels have zero points at 4 and 8 bits only, and this has {scheme}"
    return ""


def divided_groups(shape: ModelShape, scheme: Scheme, ranks: int) -> str:
    """Return why groups cannot be divided over GPUs; empty if they can.

    o and down are divided along their inputs, so each part must have whole groups.
    """
    if scheme.group == WHOLE_ROW or ranks == 1:
        return ""
    for name, width in (("o_proj", shape.num_heads * shape.head_dim),
                        ("down_proj", shape.intermediate)):  # fmt: skip
        if width % (ranks * scheme.group):
            return (
                f"the {width} inputs of {name} over {ranks} GPUs are no multiple of groups of "
                f"{scheme.group}"
            )
    return ""


def _unlike(schemes: Mapping[str, Scheme]) -> str:
    """Return linears that an engine fuses though they have several schemes; empty if none."""
    for fused in FUSED:
        found: dict[str, set[Scheme | None]] = {}
        for module in schemes:
            layer, _, name = module.rpartition(".")
            if name in fused:
                found[layer] = {schemes.get(f"{layer}.{each}") for each in fused}
        if layer := next((layer for layer, own in found.items() if len(own) > 1), ""):
            return f"{', '.join(fused)} of {layer}"
    return ""


def _transformers_quantised(config: Config, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    del config, schemes
    return {"note": "pip install compressed-tensors"}


def _vllm_quantised(config: Config, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    found = sorted(set(schemes.values()))
    why = _unread(config, schemes) or next(filter(None, map(no_kernel, found)), "")
    if why:
        return {"refused": why}
    notes = []
    if few := [str(scheme) for scheme in found if _only_humming(scheme)]:
        notes.append(f"{', '.join(few)} only by its Humming kernels, a package of their own")
    if padded := [width for width in _ffn_widths(config) if width % MARLIN_MULTIPLE]:
        notes.append(
            f"an FFN of {padded[0]} is padded when loaded; before June 2026 it was refused"
        )
    return {"note": "; ".join(notes)}


def _sglang_quantised(config: Config, schemes: Mapping[str, Scheme]) -> dict[str, str]:
    other = sorted({scheme for scheme in schemes.values() if _only_humming(scheme)})
    why = _unread(config, schemes)
    if other and not why:
        why = f"it has kernels for 4 and 8 bits and groups up to 128, and this has {other[0]}"
    return {"refused": why}


def _unread(config: Config, schemes: Mapping[str, Scheme]) -> str:
    """Return why neither vLLM nor SGLang reads the quantised weights; empty if they do."""
    if _is_remote(config):
        return "not tried with quantised weights that need a modelling file"
    if any(module.endswith(EMBEDDINGS) for module in schemes):
        return "it does not read a quantised embedding"
    unlike = _unlike(schemes)
    return f"it fuses {unlike}, which have several schemes" if unlike else ""


OF_QUANTISED: Mapping[str, Callable[[Config, Mapping[str, Scheme]], dict[str, str]]] = {
    "transformers": _transformers_quantised,
    "vLLM": _vllm_quantised,
    "SGLang": _sglang_quantised,
}


def _only_humming(scheme: Scheme) -> bool:
    """Return whether Marlin and Machete do not take a scheme."""
    if scheme.grid != INT:
        return False
    return scheme.bits not in MARLIN_BITS or scheme.group not in MARLIN_GROUPS


def _is_remote(config: Config) -> bool:
    return "layer_forms" in config


def _is_deci(config: Config) -> bool:
    return "block_configs" in config


def _fits_deci(config: Config) -> bool:
    """Return whether FFN widths are all that was cut of a Llama; `deci_widths` looks closer."""
    layers = config["layer_forms"]
    return (
        config.get("compressed_from") in ("llama", "mistral", "qwen2")
        and not _not_one_width(config)
        and all(each["norm_weights"] and not each["ranks"] for each in layers)
        and not any(each.get("links") for each in layers)
        and not (QUANTISED in config and any(w % DECI_MULTIPLE for w in _ffn_widths(config)))
    )


def _ffn_widths(config: Config) -> list[int]:
    if _is_remote(config):
        return [each["intermediate"] for each in config["layer_forms"]]
    if _is_deci(config):
        return [each["ffn"]["intermediate_size"] for each in config["block_configs"]]
    return [config["intermediate_size"]]


def _head_dim(config: Config) -> int:
    found = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(found)


def _kernels(head_dim: int) -> str:
    if head_dim in VLLM_HEAD_DIMS:
        return ""
    return f"its fast attention kernels have no head width {head_dim}"


def deci_widths(shape: ModelShape, form: ModelForm, config: Config) -> tuple[int, ...]:
    """Return the FFN width of each layer of a result in the deci form: the next multiple of 256.

    Raises:
        ConfigError: the form cannot express the result.
    """
    why = _not_deci(config, shape) or _cut(form, shape)
    if why:
        raise ConfigError(f"--format deci: {why}", hint=DECI_OTHERWISE)
    widths = tuple(-(-each.intermediate // DECI_MULTIPLE) * DECI_MULTIPLE for each in form.layers)
    for index, (width, each) in enumerate(zip(widths, form.layers, strict=True)):
        if QUANTISED in config and width != each.intermediate:
            raise ConfigError(
                f"--format deci: the FFN of layer {index} has {each.intermediate} units, and what "
                "is quantised cannot be padded",
                hint=f"compress with --multiple-of {DECI_MULTIPLE}",
            )
    return widths


def deci_blocks(shape: ModelShape, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the ``block_configs`` of layers with these FFN widths.

    Both engines take ``int(2 * ffn_mult * hidden / 3)`` and round it up to a multiple of 256. The
    factor aims at half a unit below the width, so that no rounding of its own reaches beyond it.
    """
    attention = {
        "n_heads_in_group": shape.num_heads // shape.num_kv_heads,
        "no_op": False,
        "replace_with_linear": False,
    }
    return [
        {
            "attention": attention,
            "ffn": {
                "ffn_mult": 1.5 * (width - 0.5) / shape.hidden,
                "intermediate_size": width,
                "no_op": False,
                "replace_with_linear": False,
            },
        }
        for width in widths
    ]


def _not_deci(config: Config, shape: ModelShape) -> str:
    """Return what of the original model the form has no word for."""
    if shape.family != "llama":
        return f"its engines compute a Llama, and this is a {shape.model_type}"
    window = config.get("sliding_window")
    if shape.model_type == "qwen2":
        window = config.get("use_sliding_window")
    if window:
        return "the form has no sliding window"
    activation = config.get("activation") or config.get("hidden_act") or "silu"
    return "" if activation == "silu" else f"its activation is silu, not {activation}"


def _cut(form: ModelForm, shape: ModelShape) -> str:
    """Return what else than FFN widths has changed."""
    for index, layer in enumerate(form.layers):
        whole = dense_form(shape, layer.kind)
        if (layer.qk_head_dim, layer.vo_head_dim) != (whole.qk_head_dim, whole.vo_head_dim):
            return f"attention of layer {index} has narrower heads"
        if not layer.is_plain:
            return f"layer {index} has linears of several factors"
        same = ("residual_in", "residual_mid", "residual_out", "shortcuts", "norm_weights")
        if any(getattr(layer, key) != getattr(whole, key) for key in same):
            return f"layer {index} has a narrower residual stream, or no norms of its own"
        if layer.biases != whole.biases:
            return f"layer {index} has biases that the original has not"
    outer = (form.embedding_dim, form.head_dim, form.head_norm_weight, form.head_bias)
    if outer != (shape.hidden, shape.hidden, True, False) or form.head_shortcut:
        return "the embedding or the head is narrower"
    return ""
