"""How the input model writes text: how many sequences at one time, and over how many workers."""

from dataclasses import replace

from planners.errors import PlanError
from planners.memory.generation import fewest_stages, generation_load, whole_bytes
from planners.memory.placement import Load
from planners.model.cost import BYTES_OF, model_parameters
from planners.model.form import ModelForm
from planners.model.shape import ModelShape
from planners.plan import StagePlan

PART_SEQUENCES = 32  # written at one time: enough to use a device, few enough for many workers
SMALL_BYTES = 2**28  # of keys and values that need no limit
WEIGHT_BYTES = 32  # of a token's weight, its sum and what they are computed from


def part_sequences(
    shape: ModelShape, form: ModelForm, *, length: int, microbatch: int, dtype: str
) -> int:
    """Return how many sequences are written at one time; the number of workers does not matter.

    At least a microbatch. At most as many that keys and values take no more than the weights.

    Args:
        shape: of the dense model.
        form: widths of the model that writes.
        length: tokens of a sequence in the end.
        microbatch: sequences in one of the calibration.
        dtype: of weights, keys and values.
    """
    cached = generation_load(_in(shape, dtype), form, batch=1, tokens=length).statistics
    weights = model_parameters(shape, form) * BYTES_OF[dtype]
    most = max(weights, SMALL_BYTES) // (shape.num_layers * cached)
    return max(microbatch, min(PART_SEQUENCES, most))


def writing_load(
    shape: ModelShape, form: ModelForm, *, batch: int, prompt: int, length: int, dtype: str
) -> Load:
    """Return what a worker holds while ``batch`` sequences are written after their prompts."""
    shape = _in(shape, dtype)
    prompts = generation_load(shape, form, batch=batch, tokens=prompt)
    cached = generation_load(shape, form, batch=batch, tokens=length).statistics
    # A layer's keys and values are copied as they grow, and repeated for heads that share them.
    attention = cached * (1 + shape.num_heads // shape.num_kv_heads)
    drawing = batch * shape.vocab_size * WEIGHT_BYTES
    workspace = max(prompts.workspace, prompts.microbatch + attention, drawing)
    return replace(prompts, statistics=cached, workspace=workspace)


def writing_stages(
    shape: ModelShape, load: Load, *, num_workers: int, worker_bytes: int
) -> tuple[StagePlan, ...]:
    """Return the shortest chain of stages that holds the whole model while it writes.

    Raises:
        PlanError: all workers together do not hold it: they would read it again for every token.
    """
    stages = fewest_stages(shape, load, num_workers=num_workers, worker_bytes=worker_bytes)
    if not stages:
        count = f"{num_workers} workers" if num_workers > 1 else "1 worker"
        raise PlanError(
            f"recover.data: self needs the whole model in memory, {whole_bytes(shape, load):,} "
            f"bytes; {count} of {worker_bytes:,} bytes cannot hold it",
            hint="use --recover-data SRC, more --workers, or workers with more memory",
        )
    return stages


def _in(shape: ModelShape, dtype: str) -> ModelShape:
    return replace(shape, dtype=dtype)
