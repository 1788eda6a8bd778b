"""Layers, their sizes and the workers at hand -> stages and waves."""

from dataclasses import dataclass
from itertools import pairwise

from planners.cost import BYTES_OF, layer_parameters, statistic_elements, tap_dim
from planners.errors import PlanError
from planners.packing import ROWS
from planners.plan import ModelShape, StagePlan, Statistic, dense_form
from planners.workspace import unit_bytes

WINDOW = 4  # microbatches that may wait before a stage
MAX_INFLIGHT = 2  # microbatches submitted to a stage and not yet answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a worker must hold, in bytes.

    Attributes:
        layer: weights of one dense layer.
        statistics: sums of one layer.
        microbatch: one boundary activation.
        workspace: what one layer's forward and one factorisation need on top, at their peak.
    """

    layer: int
    statistics: int
    microbatch: int
    workspace: int

    def stage(self, num_layers: int) -> dict[str, int]:
        """Return the planned bytes by kind of a worker that holds ``num_layers`` layers."""
        return {
            "weights": num_layers * self.layer,
            "statistics": num_layers * self.statistics,
            "boundaries": (WINDOW + MAX_INFLIGHT) * self.microbatch,
            "workspace": self.workspace,
        }


def load_of(
    shape: ModelShape,
    statistics: frozenset[Statistic],
    *,
    microbatch_tokens: int,
    compute_dtype: str,
) -> Load:
    """Return the bytes that a layer, its statistics and its microbatches take."""
    width = BYTES_OF[compute_dtype]
    hidden = shape.hidden
    heads = shape.num_heads * shape.head_dim
    forward = microbatch_tokens * (4 * hidden + 2 * heads + 3 * shape.intermediate) * width
    # The product of a block of rows in float32 exists beside the float64 sum, and, where they are
    # computed in another dtype, the activations in float32.
    sums = sum(statistic_elements(shape, s) for s in statistics) * 8
    widest = max((tap_dim(shape, s.tap) for s in statistics), default=0)
    product = widest * (ROWS + microbatch_tokens) * 4
    logits = min(microbatch_tokens, LOGIT_TOKENS) * shape.vocab_size * 4 * 3
    table = shape.vocab_size * hidden * BYTES_OF[shape.dtype]
    layer = layer_parameters(shape, dense_form(shape)) * width
    # A unit of compression begins when the layers of the pass and their sums are let go.
    unit = unit_bytes(shape, statistics) - layer - sums
    return Load(
        layer=layer,
        statistics=sums,
        microbatch=microbatch_tokens * hidden * width,
        workspace=max(forward + product, logits + table, unit),
    )


LOGIT_TOKENS = 1024  # rows of logits that exist at one time


def place(
    shape: ModelShape, load: Load, *, num_workers: int, worker_bytes: int | None
) -> tuple[tuple[StagePlan, ...], ...]:
    """Return the waves: each a chain of at most ``num_workers`` stages that fit in memory.

    Args:
        shape: the model.
        load: what a layer costs a worker.
        num_workers: workers at hand, >= 1.
        worker_bytes: memory of one worker; None where it is known to be enough.

    Raises:
        PlanError: one layer does not fit a worker; the message says by how many bytes.
    """
    most = shape.num_layers
    if worker_bytes is not None:
        fixed = sum(load.stage(0).values())
        per_layer = load.layer + load.statistics
        most = (worker_bytes - fixed) // per_layer
        if most < 1:
            missing = fixed + per_layer - worker_bytes
            raise PlanError(
                f"a worker of {worker_bytes:,} bytes is {missing:,} bytes too small for one layer",
                hint="give workers more memory, or a smaller microbatch or sequence length",
            )
    num_stages = min(num_workers, shape.num_layers)
    num_waves = -(-shape.num_layers // (num_stages * most))
    cuts = _even_cuts(shape.num_layers, num_waves)
    waves = []
    for first, last in cuts:
        inner = _even_cuts(last - first, min(num_stages, last - first))
        waves.append(
            tuple(
                StagePlan(
                    first=first + a,
                    last=first + b,
                    embedding=first + a == 0,
                    head=first + b == shape.num_layers,
                    bytes=load.stage(b - a),
                )
                for a, b in inner
            )
        )
    return tuple(waves)


def _even_cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """Return ``parts`` runs that cover ``count`` things and differ in length by at most one."""
    edges = [i * count // parts for i in range(parts + 1)]
    return list(pairwise(edges))
