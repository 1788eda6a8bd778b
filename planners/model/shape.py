"""The integers of a model."""

from dataclasses import dataclass

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The integers of a decoder-only transformer: all that planning needs to know about it.

    Attributes:
        family: file in ``planners/families`` that names its tensors.
        model_type: ``model_type`` of its ``config.json``.
        num_layers: decoder blocks.
        hidden: width of the residual stream.
        intermediate: inner width of the gated MLP.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: width of one head.
        vocab_size: rows of the embedding.
        tied: the head is the embedding's tensor and is stored once.
        qkv_bias: q, k and v have a bias.
        o_bias: the attention output has a bias.
        mlp_bias: gate, up and down have a bias.
        dtype: storage type of the weights, ``float32``, ``bfloat16`` or ``float16``.
    """

    family: str
    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"

    @property
    def num_sites(self) -> int:
        """Sites of the residual stream: two a layer and the one the head reads."""
        return 2 * self.num_layers + 1

    def linear_dims(self, name: str) -> tuple[int, int]:
        """Return (out, in) of one of `LINEARS` before compression."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[name]

    def has_bias(self, name: str) -> bool:
        """Return whether that linear has a bias in the input model."""
        if name in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if name == "o_proj" else self.mlp_bias
