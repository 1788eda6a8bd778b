"""Run one layer of any form in halves: attention, then MLP."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache

from actors.modeling.attention_calls import AttentionCalls
from actors.modeling.narrow_heads import narrowed
from actors.modeling.outer_model import OWN, PER_LAYER, OuterModel
from actors.modeling.travelling import COMPRESSED, classes
from planners.canonical_json import to_json
from planners.families import load as load_family
from planners.model.form import LayerForm
from planners.model.shape import ModelShape, narrower

SCORED_TOKENS = 1024  # at most, unless one sequence is longer: one number a head is to be found


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
        alone = one_layer_config(config, form, shape, index)
        self._outer = OuterModel(alone, load_family(shape.family), dtype=dtype, device=device)
        self.module: nn.Module = self._outer.layer(0, tensors)
        self._code = classes(shape.model_type)
        self._facts = self._code.facts_of(alone["layout"], alone["layer_forms"][0])

    def arguments(self, hidden: Tensor, *, cache: DynamicCache | None = None) -> dict[str, Any]:
        """Return what attention is called with beside its input, behind the tokens of a cache."""
        start = 0 if cache is None else cache.get_seq_length()
        return self._outer.layer_arguments(hidden, start=start, cache=cache)[0]

    def attention(self, hidden: Tensor, arguments: dict[str, Any] | None = None) -> Tensor:
        """Return what attention adds to the residual stream."""
        arguments = self.arguments(hidden) if arguments is None else arguments
        attended: Tensor = self._code.attention_block(self.module, self._facts, hidden, **arguments)
        return attended

    def mlp(self, middle: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream."""
        inner: Tensor = self._code.mlp_block(self.module, self._facts, middle)
        return inner

    def shortcut_attention(self, hidden: Tensor) -> Tensor:
        """Return the residual stream in the basis attention writes; unchanged if no shortcut."""
        return self._through("attn_shortcut", hidden)

    def shortcut_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream in the basis the MLP writes; unchanged if no shortcut."""
        return self._through("mlp_shortcut", middle)

    def residual_mid(self, hidden: Tensor) -> Tensor:
        """Return the residual stream between attention and MLP."""
        return self.shortcut_attention(hidden) + self.attention(hidden)

    def after_mlp(self, middle: Tensor) -> Tensor:
        """Return the residual stream after the layer."""
        return self.shortcut_mlp(middle) + self.mlp(middle)

    def output(self, hidden: Tensor) -> Tensor:
        """Return the residual stream after the layer, given the one before it."""
        if self._facts["parallel"]:
            return self.residual_mid(hidden) + self.mlp(hidden)
        return self.after_mlp(self.residual_mid(hidden))

    def score_scales(self, hidden: Tensor, pairs: Sequence[int]) -> Float[Tensor, " heads"]:
        """Return the factor of each head's q with which some rope pairs alone score best.

        Least squares, over the tokens that each token sees, of the scores of all pairs by those of
        ``pairs``, up to a constant for each token, which softmax removes. Without it the scores of
        fewer pairs are flatter, as those of different pairs rise and fall together.
        """
        calls: list[tuple[Tensor, Tensor]] = []
        with AttentionCalls(lambda query, key, *_, **__: calls.append((query, key))):
            self.attention(hidden[: max(1, SCORED_TOKENS // hidden.shape[1])])
        query, key = (each.float() for each in calls[-1])  # as rope leaves them
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        first = torch.tensor(pairs, device=hidden.device)
        channels = torch.cat((first, first + query.shape[-1] // 2))  # each pair has two
        seen = torch.ones(query.shape[2], key.shape[2], device=hidden.device).tril()
        seen /= seen.sum(-1, keepdim=True)
        found = []
        for head in range(query.shape[1]):  # the scores of one head at a time
            q, k = query[:, head], key[:, head]
            both = (q @ k.mT, q[..., channels] @ k[..., channels].mT)
            whole, kept = (s - (seen * s).sum(-1, keepdim=True) for s in both)
            energy = (seen * kept.square()).sum()
            found.append(torch.where(energy > 0, (seen * whole * kept).sum() / energy, 1.0))
        return torch.stack(found)

    def _through(self, name: str, stream: Tensor) -> Tensor:
        shortcut: Any = getattr(self.module, name, None)
        return stream if shortcut is None else shortcut(stream)


def one_layer_config(
    config: Mapping[str, Any], form: LayerForm, shape: ModelShape, index: int
) -> dict[str, Any]:
    """Return the config of a compressed model of layer ``index`` and a vocabulary of one token."""
    if form.has_stock_heads:
        config = narrowed({**config, "model_type": shape.model_type}, form.pairs)
        shape = narrower(shape, form.qk_head_dim)
    kept = {k: v for k, v in config.items() if k not in OWN}
    whole = classes(shape.model_type).StockConfig(**kept)  # it knows what a config leaves out
    lists = {key: getattr(whole, key, None) for key in PER_LAYER}
    return {
        **kept,
        **{key: [each[index]] for key, each in lists.items() if each},
        "model_type": COMPRESSED,
        "compressed_from": shape.model_type,
        "layout": load_family(shape.family).layout(shape),
        "layer_forms": [to_json(form)],
        "num_hidden_layers": 1,
        "vocab_size": 1,
        "pad_token_id": None,
        "embedding_dim": shape.hidden,
        "head_input_dim": shape.hidden,
        "head_bias": shape.head_bias,
        "head_shortcut": False,
    }
