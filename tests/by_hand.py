"""Several steps done by hand: the methods' functions on sums that plain hooks saw, in float64.

Nothing here goes through stages, units, records or stitching; it is what those are compared with.
"""

from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from actors import methods
from actors.modeling.travelling import classes
from actors.storage.checkpoint import Checkpoint
from orchestrator.prepare.model_config import result_config
from orchestrator.recipe.method_options import resolve_options
from planners.families import load as load_family


def dense_model(folder):
    """Return a checkpoint of ours as its users get it, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, local_files_only=True)
    return model.eval()


@torch.inference_mode()
def observed(model, ids):
    """Return, of each layer, tap -> activations (tokens, width), and what enters as ``probe``."""
    layers = model.model.layers
    seen = [{} for _ in layers]
    handles = []
    for layer, taps in zip(layers, seen, strict=True):
        for name, module, output in (
            ("resid_attn", layer.input_layernorm, False),
            ("resid_mlp", layer.post_attention_layernorm, False),
            ("attn_in", layer.self_attn.q_proj, False),
            ("o_in", layer.self_attn.o_proj, False),
            ("mlp_in", layer.mlp.gate_proj, False),
            ("mlp_hidden", layer.mlp.down_proj, False),
            ("q_rope", layer.self_attn.q_proj, True),
            ("k_rope", layer.self_attn.k_proj, True),
            ("v", layer.self_attn.v_proj, True),
            ("resid_out", layer, True),
        ):

            def keep(_, args, out, name=name, taps=taps, output=output):
                value = out if output else args[0]
                value = value[0] if isinstance(value, tuple) else value
                taps[name] = value.flatten(0, -2)

            handles.append(module.register_forward_hook(keep))
    for layer, taps in zip(layers, seen, strict=True):

        def keep_input(_, args, kwargs, taps=taps):
            taps["probe"] = args[0] if args else kwargs["hidden_states"]

        handles.append(layer.register_forward_pre_hook(keep_input, with_kwargs=True))
    model(ids)
    for handle in handles:
        handle.remove()
    return seen


def sums_of(taps, form):
    """Return the statistics of one layer, named as methods ask for them."""
    sums = {"num_tokens": torch.tensor([len(taps["attn_in"])])}
    for name, x in taps.items():
        if name == "probe":
            continue
        sums[f"{name}.sum"] = x.sum(0)
        if name in ("q_rope", "k_rope"):
            heads = x.shape[1] // form.qk_head_dim
            halves = x.square().sum(0).reshape(heads, 2, -1)
            sums[f"{name}.pair_energy"] = halves.sum(1)
        elif name == "v":
            heads = x.reshape(len(x), -1, form.vo_head_dim)
            sums["v.head_gram"] = torch.einsum("thi,thj->hij", heads, heads)
        else:
            sums[f"{name}.gram"] = x.T @ x
    return sums


def step_by_hand(model, folder, recipe, *, start, form, ids):
    """Return the model that a step of a recipe makes of another, and its bases, if it has any.

    The widths it begins with and those it is to have are given.
    """
    method, spec = recipe["method"], methods.spec(recipe["method"])
    options = resolve_options(spec, recipe["options"])
    checkpoint = Checkpoint(str(folder))
    shape, family = checkpoint.shape, load_family(checkpoint.shape.family)
    seen = observed(model, ids)
    state = dict(model.state_dict())
    head = state.get(family.head, state[family.embedding])
    run = methods.load(method)
    sums = [sums_of(t, f) for t, f in zip(seen, start.layers, strict=True)]
    new, bases = {}, []
    if spec.residual:
        grams = [s[f"{tap}.gram"] for s in sums for tap in ("resid_attn", "resid_mlp")]
        dims = [d for layer in form.layers for d in (layer.residual_in, layer.residual_mid)]
        for gram, dim in zip(
            (*grams, sums[-1]["resid_out.gram"]), (*dims, form.layers[-1].residual_out),
            strict=True,
        ):  # fmt: skip
            bases.append(run.factor([gram], keep_dim=dim, where="").vectors)
    for index, (each, layer) in enumerate(zip(sums, form.layers, strict=True)):
        prefix = family.layer.format(i=index) + "."
        weights = {
            family.role_of(name.removeprefix(prefix)): tensor
            for name, tensor in state.items()
            if name.startswith(prefix)
        }
        if bases:
            made = run.apply(
                weights, tuple(bases[2 * index : 2 * index + 3]), shape=shape, form=layer
            )
        else:
            made, _ = run.compress(weights, each, shape=shape, form=layer, options=options)
        new |= {prefix + family.below_layer(role): tensor for role, tensor in made.items()}
    new[family.embedding], new[family.head] = state[family.embedding], head
    if family.final_norm in state:
        new[family.final_norm] = state[family.final_norm]
    if bases:
        scale = new.pop(family.final_norm)
        new[family.embedding] = run.apply_embedding(new[family.embedding], bases[0], shape=shape)
        new[family.head] = run.apply_head(
            head, bases[-1], shape=shape, norm_weight=scale, native=False
        )
    return built(checkpoint, form, new), bases


def built(checkpoint, form, state):
    """Return a model of these widths and tensors."""
    shape = checkpoint.shape
    config = result_config(checkpoint.config, shape, replace(form, native=False))
    code = classes(shape.model_type)
    kept = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    model = code.CompressedForCausalLM(code.CompressedConfig(**kept)).double().eval()
    model.load_state_dict(state, strict=True)
    return model


def parameters_of(model, *, tied):
    """Return the elements of a model's weights, a tied head once."""
    named = dict(model.named_parameters())
    if tied:
        named.pop("lm_head.weight", None)
    return sum(p.numel() for p in named.values())
