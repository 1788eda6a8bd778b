"""Run one layer of any form in halves: attention, then MLP."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from actors.modeling.modeling_compressed import CompressedConfig
from actors.modeling.outer_model import OuterModel
from planners.canonical_json import to_json
from planners.families import load as load_family
from planners.families.llama import windows
from planners.model.form import LayerForm
from planners.model.shape import ModelShape


class HalvedLayer:
    """A layer of any form, dense or compressed, whose attention and MLP can be run separately.

    Attributes:
        module: the layer itself.
    """

    def __init__(  # noqa: PLR0913 a layer, and where it stands
        self,
        tensors: Mapping[str, Tensor],
        form: LayerForm,
        config: Mapping[str, Any],
        *,
        index: int,
        shape: ModelShape,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Build layer ``index`` from tensors keyed by their names relative to the layer."""
        alone = {**one_layer_config(config, shape, index), "layer_forms": [to_json(form)]}
        self._outer = OuterModel(alone, load_family(shape.family), dtype=dtype, device=device)
        self.module: nn.Module = self._outer.layer(0, tensors)

    def attention(self, hidden: Tensor) -> Tensor:
        """Return what attention adds to the residual stream."""
        layer: Any = self.module
        arguments = self._outer.layer_arguments(hidden)[0]
        attended: Tensor = layer.self_attn(layer.input_layernorm(hidden), **arguments)[0]
        return attended

    def mlp(self, middle: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream."""
        layer: Any = self.module
        inner: Tensor = layer.mlp(layer.post_attention_layernorm(middle))
        return inner

    def shortcut_attention(self, hidden: Tensor) -> Tensor:
        """Return the residual stream in the basis attention writes; unchanged if no shortcut."""
        layer: Any = self.module
        stream: Tensor = layer.attn_shortcut(hidden)
        return stream

    def shortcut_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream in the basis the MLP writes; unchanged if no shortcut."""
        layer: Any = self.module
        stream: Tensor = layer.mlp_shortcut(middle)
        return stream

    def residual_mid(self, hidden: Tensor) -> Tensor:
        """Return the residual stream between attention and MLP."""
        return self.shortcut_attention(hidden) + self.attention(hidden)

    def after_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        return self.shortcut_mlp(middle) + self.mlp(middle)

    def output(self, hidden: Tensor) -> Tensor:
        """Return the residual stream after the layer, given the one before it."""
        return self.after_mlp(self.residual_mid(hidden))


def one_layer_config(config: Mapping[str, Any], shape: ModelShape, index: int) -> dict[str, Any]:
    """Return the config of a compressed model of layer ``index`` and a vocabulary of one token."""
    kept = {
        k: v for k, v in config.items() if k not in ("architectures", "auto_map", "layer_types")
    }
    return {
        **kept,
        "model_type": CompressedConfig.model_type,
        "num_hidden_layers": 1,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "sliding_window": windows({**config, "model_type": shape.model_type})[index],
        "vocab_size": 1,
        "pad_token_id": None,
        "embedding_dim": shape.hidden,
        "head_input_dim": shape.hidden,
    }
