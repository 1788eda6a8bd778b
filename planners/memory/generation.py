"""Memory of a model that generates, and how many workers hold all of it at the same time."""

from collections.abc import Sequence

from planners.errors import PlanError
from planners.memory.peaks import LIBRARIES, SINGLE, forward_bytes, load_bytes, table_bytes
from planners.memory.placement import Load, place
from planners.model.cost import BYTES_OF, held_parameters, widest_layer
from planners.model.form import ModelForm
from planners.model.serving_load import ServingLoad
from planners.model.shape import ModelShape
from planners.plan import StagePlan


def generation_load(shape: ModelShape, form: ModelForm, *, batch: int, tokens: int) -> Load:
    """Return what a worker holds while it generates with some layers, in their stored dtype.

    Args:
        shape: of the dense model.
        form: widths of the model that generates.
        batch: sequences at one time.
        tokens: of each, including the prompt.
    """
    width, dtype = BYTES_OF[shape.dtype], shape.dtype
    largest = max(form.layers, key=lambda layer: held_parameters(shape, layer))
    widest = widest_layer(form)
    cached = batch * tokens * shape.num_kv_heads * (widest.qk_head_dim + widest.vo_head_dim) * width
    passing = max(
        forward_bytes(
            shape,
            frozenset(),
            tokens=batch * tokens,
            sequence_length=tokens,
            dtype=dtype,
            form=each,
        )
        for each in (widest, *form.layers)
    )
    logits = batch * shape.vocab_size * (width + SINGLE)
    loading = load_bytes(shape, dtype=dtype, form=largest)
    return Load(
        layer=held_parameters(shape, largest) * width,
        statistics=cached,
        microbatch=batch * tokens * shape.hidden * width,
        # A layer's keys and values are copied when they grow.
        workspace=max(passing + cached, logits, loading),
        table=table_bytes(shape, dtype=dtype),
        libraries=LIBRARIES,
    )


def workspace_bytes(shape: ModelShape, form: ModelForm, load: ServingLoad) -> int:
    """Return what generation needs beside weights, keys and values, where prompts pass at once."""
    held = generation_load(shape, form, batch=load.batch, tokens=load.context)
    return held.workspace + held.microbatch


def whole_bytes(shape: ModelShape, load: Load) -> int:
    """Return the bytes of one worker that holds all layers."""
    return sum(load.stage(shape.num_layers, tables=2).values())


def largest_batch(
    models: Sequence[tuple[ModelShape, ModelForm]], *, tokens: int, worker_bytes: int, most: int
) -> int:
    """Return the largest power of two of sequences for which one worker holds all models.

    0 where there is no room for one sequence.

    Args:
        models: held at the same time, each with its keys, values and logits.
        tokens: of each sequence, including the prompt.
        worker_bytes: memory of the worker.
        most: sequences at most.
    """

    def fits(batch: int) -> bool:
        loads = [(s, generation_load(s, form, batch=batch, tokens=tokens)) for s, form in models]
        return sum(whole_bytes(shape, load) for shape, load in loads) <= worker_bytes

    batch = 0
    while max(1, 2 * batch) <= most and fits(max(1, 2 * batch)):
        batch = max(1, 2 * batch)
    return batch


def fewest_stages(
    shape: ModelShape, load: Load, *, num_workers: int, worker_bytes: int
) -> tuple[StagePlan, ...]:
    """Return the shortest chain of stages that holds the whole model; empty where none does."""
    try:
        for count in range(1, min(num_workers, shape.num_layers) + 1):
            waves = place(shape, load, num_workers=count, worker_bytes=worker_bytes)
            if len(waves) == 1:
                return waves[0]
    except PlanError:
        return ()  # not even one layer fits a worker
    return ()
