"""What a cut costs, measured on its layer alone: the probe's dense inputs go through both layers.

The damage of a cut is the mean over tokens of ``|y' - y|^2 / |y|^2``, y the residual stream that
leaves the dense layer and y' the one that leaves the layer with one module cut. Only the cut module
and what follows it in the layer is recomputed.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actors import methods
from actors.messages import CompressionJob
from actors.modeling.build import Skeleton
from actors.modeling.modeling_compressed import CompressedConfig
from planners.allocation import form_of, full_widths, levels
from planners.families import load as load_family
from planners.plan import LayerForm, ModelShape, to_json

Curves = dict[str, list[list[float]]]


@torch.inference_mode()
def damage_curves(
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    job: CompressionJob,
    device: str,
) -> Curves:
    """Return module -> [[width, damage], ...], the full width first, for one layer.

    Args:
        weights: role -> dense tensor of the layer.
        sums: its statistics and its probe, (sequences, tokens, hidden).
        config: the input model's ``config.json``.
        job: method, options and shape.
        device: where to compute.
    """
    shape = job.shape
    probe = sums["probe"].to(device)
    dense = _Layer(weights, form_of(shape, [full_widths(shape)]).layers[0], config, shape, probe)
    middle, output = dense.after_attention(probe), dense.output(probe)
    energy = output.float().square().sum(-1)  # (sequences, tokens)
    shares = [float(share) for share in str(job.options["grid"]).split(",")]
    curves: Curves = {}
    for module in methods.spec(job.method).cuts(job.options):
        full = full_widths(shape)
        curves[module] = [[full[module], 0.0]]
        for width in levels(shape, module, shares, round_to=int(job.options["round_to"])):
            form = form_of(shape, [full | {module: width}]).layers[0]
            new, _ = methods.load(job.method).compress(
                weights, sums, shape=shape, form=form, options=job.options
            )
            cut = _Layer(new, form, config, shape, probe)
            # Attention is not touched by a cut of the MLP, so the residual before it stands.
            after = cut.after_mlp(middle) if module == "mlp" else cut.output(probe)
            lost = (after.float() - output.float()).square().sum(-1) / energy
            curves[module].append([width, float(lost.double().mean())])
    return curves


class _Layer:
    """One compressed layer that can be run in halves."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        form: LayerForm,
        config: Mapping[str, Any],
        shape: ModelShape,
        probe: Tensor,
    ) -> None:
        family = load_family(shape.family)
        names = {**family.linears, **family.norms, "rope_pairs": "self_attn.rope_pairs"}
        tensors = {}
        for role, tensor in weights.items():
            part, dot, rest = role.partition(".")
            tensors[f"{names[part]}{dot}{rest}"] = tensor
        alone = {**one_layer_config(config, shape), "layer_forms": [to_json(form)]}
        skeleton = Skeleton(alone, dtype=probe.dtype, device=str(probe.device))
        self._layer: nn.Module = skeleton.layer(0, tensors)
        self._angles = skeleton.angles(probe)

    def after_attention(self, hidden: Tensor) -> Tensor:
        """Return the residual stream between attention and MLP."""
        layer: Any = self._layer
        normed = layer.input_layernorm(hidden)
        attended: Tensor = layer.self_attn(normed, position_embeddings=self._angles)
        return hidden + attended

    def after_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream that leaves."""
        layer: Any = self._layer
        inner: Tensor = layer.mlp(layer.post_attention_layernorm(middle))
        return middle + inner

    def output(self, hidden: Tensor) -> Tensor:
        """Return the residual stream that leaves, from the one that enters."""
        return self.after_mlp(self.after_attention(hidden))


def one_layer_config(config: Mapping[str, Any], shape: ModelShape) -> dict[str, Any]:
    """Return a compressed model's config of one layer with nothing around it worth memory."""
    kept = {
        k: v for k, v in config.items() if k not in ("architectures", "auto_map", "layer_types")
    }
    return {
        **kept,
        "model_type": CompressedConfig.model_type,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "sliding_window": None,  # the probe is not longer than any window
        "qkv_bias": shape.qkv_bias,
        "mlp_bias": shape.mlp_bias,
        "vocab_size": 1,
        "pad_token_id": None,
        "embedding_dim": shape.hidden,
        "head_input_dim": shape.hidden,
    }
