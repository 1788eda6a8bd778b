"""Place layers on workers: their sizes and the available workers give stages and waves."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from planners.batching import TokenBatching
from planners.errors import PlanError
from planners.memory.peaks import LIBRARIES, forward_bytes, load_bytes, loss_bytes, table_bytes
from planners.model.cost import (
    BYTES_OF,
    dense_model_form,
    held_parameters,
    statistic_elements,
    widest_layer,
)
from planners.model.form import LayerForm, ModelForm, dense_form
from planners.model.shape import ModelShape
from planners.model.taps import Statistic
from planners.plan import StagePlan

WINDOW = 4  # microbatches that may wait before a stage
MAX_INFLIGHT = 2  # microbatches submitted to a stage that have not returned yet
BOUNDARIES_HELD = (
    2  # boundary activations in a worker's own memory; those that wait are in shared memory
)
UNBOUNDED = 2**62
STORE_MARGIN = 4  # times what waits at one time, because the object store frees memory late


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a worker must hold, in bytes.

    Attributes:
        layer: weights of one dense layer.
        statistics: sums of one layer; during generation, its keys and values.
        microbatch: one boundary activation.
        workspace: what the forward pass, loss or loading of one layer needs on top.
        table: the embedding, or the head, which the first and last stage hold beside layers.
        unit: the peak of the largest compression unit; layers are freed before it.
        in_flight: of the units before and after it, where there is room for them.
        libraries: what the libraries use beside tensors.
        evaluation: the load while losses are measured, if that uses a wider dtype.
    """

    layer: int
    statistics: int
    microbatch: int
    workspace: int
    table: int = 0
    unit: int = 0
    in_flight: int = 0
    libraries: int = 0
    evaluation: "Load | None" = None

    def stage(self, num_layers: int, *, tables: int = 0) -> dict[str, int]:
        """Return kind -> planned bytes of a worker that holds this many layers and tables."""
        held = {
            "weights": num_layers * self.layer + tables * self.table,
            "statistics": num_layers * self.statistics,
            "boundaries": BOUNDARIES_HELD * self.microbatch,
            "libraries": self.libraries,
        }
        others = [self.unit + self.in_flight + self.libraries]
        if self.evaluation is not None:
            others.append(sum(self.evaluation.stage(num_layers, tables=tables).values()))
        return {**held, "workspace": max(self.workspace, max(others) - sum(held.values()))}

    def shortfall(self, worker_bytes: int, *, num_layers: int) -> int:
        """Return the bytes that a worker lacks for one layer; 0 or less if one fits."""
        tables = 2 if num_layers == 1 else 1  # the stage of a one-layer model holds both tables
        return sum(self.stage(1, tables=tables).values()) - worker_bytes


def load_of(  # noqa: PLR0913 what a worker does
    shape: ModelShape,
    statistics: frozenset[Statistic],
    batching: TokenBatching,
    *,
    unit: int = 0,
    in_flight: int = 0,
    start: ModelForm | None = None,
    result: ModelForm | None = None,
) -> Load:
    """Return the bytes of a layer, its statistics and its microbatches.

    Args:
        shape: of the model.
        statistics: summed for each layer.
        batching: of the tokens.
        unit: the peak of the largest compression unit, if any.
        in_flight: what is held beside it for other units.
        start: widths of the model in the stages; the uncompressed model if None. If given, the
            dense model is evaluated in the same stages too.
        result: widths of the result, which is evaluated in the same stages.
    """
    dtype, tokens = batching.dtype, batching.microbatch_tokens
    width = BYTES_OF[dtype]
    start = start or dense_model_form(shape)
    widest = widest_layer(start)
    sums = sum(statistic_elements(shape, s, widest) for s in statistics)
    dense = [dense_form(shape, kind) for kind in range(len(shape.kinds))]
    forms = list(dense)  # equal layers are counted once
    for layer in (*start.layers, *(result.layers if result is not None else ())):
        forms += [layer] * (layer not in forms)

    def passed(form: LayerForm, observed: frozenset[Statistic]) -> int:
        return forward_bytes(
            shape,
            observed,
            tokens=tokens,
            sequence_length=batching.sequence_length,
            dtype=dtype,
            form=form,
        )

    passing = max(passed(widest, statistics), *(passed(form, frozenset()) for form in forms))
    losing = loss_bytes(shape, tokens=tokens, dtype=dtype)
    # Shortcuts of an earlier step may make a layer larger than the dense one.
    largest = max((*dense, *start.layers), key=lambda f: held_parameters(shape, f))
    loading = load_bytes(shape, dtype=dtype, form=largest)
    return Load(
        layer=held_parameters(shape, largest) * width,
        statistics=sums * 8,
        microbatch=tokens * shape.hidden * width,
        workspace=max(passing, losing, loading),
        table=table_bytes(shape, dtype=dtype),
        unit=unit,
        in_flight=in_flight,
        libraries=LIBRARIES,
    )


def place(
    shape: ModelShape, load: Load, *, num_workers: int, worker_bytes: int | None
) -> tuple[tuple[StagePlan, ...], ...]:
    """Return the waves: each a chain of at most ``num_workers`` stages that fit in memory.

    Args:
        shape: the model.
        load: bytes of a layer in a worker.
        num_workers: available workers, >= 1.
        worker_bytes: memory of one worker; None if it is known to be enough.

    Raises:
        PlanError: one layer does not fit a worker; the message says by how many bytes.
    """
    num_stages = min(num_workers, shape.num_layers)
    memory = worker_bytes if worker_bytes is not None else UNBOUNDED
    missing = load.shortfall(memory, num_layers=shape.num_layers)
    if missing > 0:
        raise PlanError(
            f"a worker of {memory:,} bytes is {missing:,} bytes too small for one layer",
            hint="give workers more memory, or a smaller microbatch or sequence length",
        )
    # A worker can hold one layer, so one wave per layer always fits.
    for num_waves in range(1, shape.num_layers + 1):
        waves = _waves(shape.num_layers, load, num_waves=num_waves, num_stages=num_stages)
        if all(sum(stage.bytes.values()) <= memory for wave in waves for stage in wave):
            break
    return waves


def _waves(
    num_layers: int, load: Load, *, num_waves: int, num_stages: int
) -> tuple[tuple[StagePlan, ...], ...]:
    """Return the layers in ``num_waves`` waves of up to ``num_stages`` stages, evenly divided."""
    waves = []
    for first, last in _even_cuts(num_layers, num_waves):
        inner = _even_cuts(last - first, min(num_stages, last - first))
        waves.append(
            tuple(_stage(load, first + a, first + b, num_layers=num_layers) for a, b in inner)
        )
    return tuple(waves)


def _stage(load: Load, first: int, last: int, *, num_layers: int) -> StagePlan:
    embedding, head = first == 0, last == num_layers
    return StagePlan(
        first=first,
        last=last,
        embedding=embedding,
        head=head,
        bytes=load.stage(last - first, tables=int(embedding) + int(head)),
    )


def shared_bytes(wave: Sequence[StagePlan]) -> int:
    """Return the shared memory for the activations that wait for a stage; one hands none on."""
    if len(wave) == 1:
        return 0
    stage = wave[0]
    return STORE_MARGIN * (WINDOW + MAX_INFLIGHT) * stage.bytes["boundaries"] // BOUNDARIES_HELD


def _even_cuts(count: int, parts: int) -> list[tuple[int, int]]:
    """Return ``parts`` ranges that cover ``count`` items and differ in length by at most one."""
    edges = [i * count // parts for i in range(parts + 1)]
    return list(pairwise(edges))
