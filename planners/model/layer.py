"""One kind of decoder layer as data: its spaces, the linears between them, its norms and wiring.

A *space* is what a method may cut: the residual stream, the inner units of the MLP, the channels of
a query and key head, those of a value head. Each has a group of maps that leave the layer's output
unchanged when applied to all that write and read the space; a method picks one of them from
statistics and truncates. The tests of `tests/families` apply a random one, which proves the data.
"""

from dataclasses import dataclass

# What a family calls its linears is in `planners.families`; this is what they are called here.
ROLES: tuple[str, ...] = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
ATTENTION: tuple[str, ...] = ROLES[:4]
SPACES: tuple[str, ...] = ("residual", "mlp", "qk", "vo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A width that a method may cut.

    Attributes:
        name: one of `SPACES`.
        group: maps that leave the layer unchanged. ``orthogonal``; ``permutation``; ``pairs``:
            one complex number for each pair of channels that rope rotates, and any invertible map
            of the channels it does not; ``general``: any invertible map of a KV head; ``none``.
        reason: why there are none.
    """

    name: str
    group: str
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """A linear map of a layer.

    Attributes:
        role: one of `ROLES`.
        reads: width of its input: ``residual_in``, ``residual_mid``, ``o`` or ``ffn``.
        writes: width of its output: ``q``, ``k``, ``v``, ``ffn``, ``residual_mid`` or
            ``residual_out``.
        bias: it has a bias in the input model.
    """

    role: str
    reads: str
    writes: str
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm.

    Attributes:
        role: ``attn_norm``, ``mlp_norm``, ``q_norm``, ``k_norm``, or ``final_norm`` of the model.
        kind: ``rms``, or ``layer``: it also subtracts the mean.
        over: width that it normalises: ``residual_in``, ``residual_mid``, or ``head``.
        plus_one: the scale is 1 + the stored weight.
        scale: it stores a weight.
        bias: it stores a bias.
    """

    role: str
    kind: str = "rms"
    over: str = "residual_in"
    plus_one: bool = False
    scale: bool = True
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What all layers of one kind have in common.

    Attributes:
        linears: in the order of the forward pass.
        norms: those of the two blocks, then those of q and k. In a parallel layer with one norm
            for both blocks, that is ``attn_norm``.
        spaces: one of each name.
        parallel: attention and MLP read the same residual stream, and both are added to it.
        rotary: channels of a query or key head that rope rotates, the first ones.
        pairs: which of them rotate together: ``half``: i and i + rotary / 2; ``interleaved``: 2i
            and 2i + 1.
        residual_scale: factor of what a block adds to the residual stream.
    """

    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    spaces: tuple[Space, ...]
    parallel: bool = False
    rotary: int = 0
    pairs: str = "half"
    residual_scale: float = 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of its linears, in the order of the forward pass."""
        return tuple(linear.role for linear in self.linears)

    @property
    def biases(self) -> tuple[str, ...]:
        """The roles of the linears that have a bias."""
        return tuple(linear.role for linear in self.linears if linear.bias)

    @property
    def mlp_reads(self) -> str:
        """The width that the MLP reads."""
        return "residual_in" if self.parallel else "residual_mid"

    def linear(self, role: str) -> Linear:
        """Return the linear of a role."""
        return next(linear for linear in self.linears if linear.role == role)

    def space(self, name: str) -> Space:
        """Return the space of a name."""
        return next(space for space in self.spaces if space.name == name)

    def readers(self, norm: str) -> tuple[str, ...]:
        """Return the roles of the linears that read the output of a norm of a block."""
        attention = ("q_proj", "k_proj", "v_proj")
        mlp = tuple(role for role in ("gate_proj", "up_proj") if role in self.roles)
        if norm == "mlp_norm":
            return mlp
        alone = any(each.role == "mlp_norm" for each in self.norms)
        return attention if alone else attention + mlp


def decoder_layer(  # noqa: PLR0913 the facts in which layers differ
    *,
    rotary: int,
    pairs: str = "half",
    gated: bool = True,
    biases: frozenset[str] = frozenset(),
    norm: Norm | None = None,
    parallel: bool = False,
    norms: int = 2,
    head_norm: Norm | None = None,
    residual_scale: float = 1.0,
) -> LayerKind:
    """Return a layer of attention and an MLP, each behind a norm of the residual stream.

    Args:
        rotary: channels of a head that rope rotates; 0 without rope.
        pairs: see `LayerKind`.
        gated: the MLP has a ``gate_proj``.
        biases: roles of the linears with a bias.
        norm: kind of the norms of the blocks; RMS with a scale if None.
        parallel: see `LayerKind`.
        norms: 1 where both blocks read one norm.
        head_norm: kind of the norms of q and k, if they have any.
        residual_scale: see `LayerKind`.
    """
    mid = "residual_in" if parallel else "residual_mid"
    after_attention = "residual_out" if parallel else "residual_mid"
    ends = {
        "q_proj": ("residual_in", "q"),
        "k_proj": ("residual_in", "k"),
        "v_proj": ("residual_in", "v"),
        "o_proj": ("o", after_attention),
        "gate_proj": (mid, "ffn"),
        "up_proj": (mid, "ffn"),
        "down_proj": ("ffn", "residual_out"),
    }
    kind = norm or Norm(role="")
    return LayerKind(
        linears=tuple(
            Linear(role=role, reads=reads, writes=writes, bias=role in biases)
            for role, (reads, writes) in ends.items()
            if gated or role != "gate_proj"
        ),
        norms=(
            _norm(kind, "attn_norm", "residual_in"),
            *([_norm(kind, "mlp_norm", mid)] * (norms - 1)),
            *(
                [_norm(head_norm, role, "head") for role in ("q_norm", "k_norm")]
                if head_norm
                else []
            ),
        ),
        spaces=(
            Space(name="residual", group="orthogonal"),
            Space(name="mlp", group="permutation"),
            _qk_space(rotary, head_norm),
            Space(name="vo", group="general"),
        ),
        parallel=parallel,
        rotary=rotary,
        pairs=pairs,
        residual_scale=residual_scale,
    )


def _norm(like: Norm, role: str, over: str) -> Norm:
    return Norm(
        role=role, kind=like.kind, over=over, plus_one=like.plus_one, scale=like.scale,
        bias=like.bias,
    )  # fmt: skip


def _qk_space(rotary: int, head_norm: Norm | None) -> Space:
    if head_norm is not None:
        reason = "q and k are normalised over the channels that would be removed"
        return Space(name="qk", group="none", reason=reason)
    return Space(name="qk", group="pairs" if rotary else "general")
