"""Points in a layer where activations are observed, and the statistics taken there."""

from collections.abc import Iterable
from dataclasses import dataclass

from planners.model.layer import LayerKind
from planners.model.shape import ModelShape
from planners.model.statistic_kinds import StatisticKind, parsed


@dataclass(frozen=True, slots=True, order=True)
class Statistic:
    """A sum over calibration tokens: what is observed, and what is summed.

    Attributes:
        tap: the point in a layer, e.g. ``resid_attn``.
        kind: one of `planners.model.statistic_kinds`, such as ``gram`` or ``probe8192``.
    """

    tap: str
    kind: str

    def __str__(self) -> str:
        """Return the name under which it is stored."""
        return f"{self.tap}.{self.kind}"

    @property
    def row(self) -> StatisticKind:
        """What is known of its kind."""
        return parsed(self.kind)[0]

    @property
    def probe_tokens(self) -> int:
        """How many tokens' activations it keeps; 0 where it is a sum."""
        return parsed(self.kind)[1]


def layer_statistics(
    shape: ModelShape, statistics: frozenset[Statistic], layer: int
) -> list[Statistic]:
    """Return the statistics that one layer sums, of those that the model's layers sum.

    Only the last layer observes its output. A layer without rope has no rope pairs, and so on.
    """
    kind = shape.kinds[shape.kind_of[layer]]
    last = layer == shape.num_layers - 1
    return sorted(
        s
        for s in statistics
        if (s.tap != "resid_out" or s.row.of_change or last)
        and not (s.tap == "resid_mlp" and kind.parallel)
        and (s.tap not in ROPE_TAPS or _is_observed(s, kind, shape.head_dim))
    )


def _is_observed(statistic: Statistic, kind: LayerKind, head_dim: int) -> bool:
    of_pairs = statistic.row.name.endswith("pair_energy")
    return kind.rotary > 0 if of_pairs else kind.rotary < head_dim


ROPE_TAPS = ("q_rope", "k_rope")

# Role of a linear -> the tap of its inputs.
INPUT_OF = {
    "q_proj": "attn_in",
    "k_proj": "attn_in",
    "v_proj": "attn_in",
    "o_proj": "o_in",
    "gate_proj": "mlp_in",
    "up_proj": "mlp_in",
    "down_proj": "mlp_hidden",
}

# Taps in the order of a layer's forward pass.
TAPS = (
    "resid_attn",
    "attn_in",
    "q_rope",
    "k_rope",
    "v",
    "o_in",
    "resid_mlp",
    "mlp_in",
    "mlp_hidden",
    "resid_out",
)


def last_tap(statistics: Iterable[Statistic]) -> str:
    """Return the last tap that these statistics of one layer need."""
    return max((s.tap for s in statistics), key=TAPS.index, default=TAPS[0])


def input_of(matrix: str) -> str:
    """Return what a matrix reads, see `planners.model.cost.matrices`.

    That is the tap of its linear; of the second of two factors, which alone reads the first, its
    own name.
    """
    role, _, part = matrix.partition(".")
    return matrix if part == "second" else INPUT_OF[role]


def of_one_input(names: Iterable[str]) -> list[list[str]]:
    """Return matrices of a layer in lists, each of those that read the same inputs."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(input_of(name), []).append(name)
    return list(found.values())


def gram_statistics(shape: ModelShape) -> set[Statistic]:
    """Return the Gram matrices of the inputs of all linears."""
    roles = {role for kind in shape.kinds for role in kind.roles}
    return {Statistic(INPUT_OF[role], "gram") for role in roles}
