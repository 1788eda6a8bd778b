"""Validate a checkpoint before any worker or device is reserved."""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from actors.modeling.travelling import CODE, COMPRESSED
from actors.storage.checkpoint import Checkpoint, read_json
from actors.storage.quantised import part_shapes
from actors.storage.quoting import error_text, shown
from planners.errors import ModelError
from planners.families import load as load_family

PAIRS = ".rope_pairs"  # which pairs of channels narrower query and key heads kept
GENERATION = "generation_config.json"

# What transformers raises for an invalid config: it documents no exception class of its own.
_REFUSALS = (
    StrictDataclassError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def check(checkpoint: Checkpoint) -> None:
    """Run the cheap part of what workers will do with a dense checkpoint.

    Raises:
        ModelError: it is already compressed or comes with code, transformers rejects its config,
            or a stored head differs from the embedding although the config says they are tied.
    """
    if checkpoint.config.get("model_type") == COMPRESSED:
        raise ModelError(
            f"{checkpoint.directory.uri}: is already a compressed model",
            hint="compress the original model to a smaller size instead",
        )
    if checkpoint.schemes:
        raise ModelError(
            f"{checkpoint.directory.uri}: is quantised already",
            hint="use the original weights: what is quantised cannot be cut or rounded again",
        )
    if checkpoint.directory.size(CODE) is not None:
        raise ModelError(
            f"{checkpoint.directory.path(CODE)}: code that comes with a model is never run",
            hint="remove the file: a model that is not compressed does not need it",
        )
    shape = checkpoint.shape
    check_classes(checkpoint)
    _check_generation(checkpoint)
    family = load_family(shape.family)
    if shape.tied and family.head in checkpoint.locations:
        _check_tied(checkpoint, family.embedding, family.head)


def check_classes(checkpoint: Checkpoint) -> None:
    """Build a model on the meta device; check the tensors of a compressed one against it.

    Raises:
        ModelError: the model cannot be built from its config, or a tensor has a wrong shape or
            invalid values.
    """
    from actors.modeling.outer_model import empty_model  # seconds, for transformers

    where = checkpoint.directory.path("config.json")
    try:
        model = empty_model(checkpoint.config)
        compressed = checkpoint.config["model_type"] == COMPRESSED
        shapes = _compressed_shapes(checkpoint, model) if compressed or checkpoint.schemes else {}
    except _REFUSALS as error:
        raise ModelError(
            f"{where}: transformers cannot build this model: {error_text(error)}"
        ) from error
    stored = {name: place.entry.shape for name, place in checkpoint.locations.items()}
    expected = _as_stored(checkpoint, shapes)
    wrong = [name for name, dims in expected.items() if stored.get(name) != dims]
    if wrong:
        found = list(stored.get(wrong[0], ())) or "missing"
        raise ModelError(
            f"{where}: requires tensor {wrong[0]} with shape {list(expected[wrong[0]])}; "
            f"in the weights it is {found}"
        )
    if compressed:
        _check_pairs(checkpoint)


def _as_stored(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return tensor -> shape that files must contain, with the parts of quantised matrices.

    Raises:
        ModelError: the config quantises what is no matrix of the model, or its groups do not fit.
    """
    found = dict(shapes)
    for module, scheme in checkpoint.schemes.items():
        dims = found.pop(f"{module}.weight", ())
        match dims:
            case (rows, width):
                parts = part_shapes(scheme, (rows, width))
            case _:
                parts = {}
        if not parts:
            raise ModelError(
                f"{checkpoint.directory.path('config.json')}: says that {shown(module)} is "
                f"quantised as {scheme}; it has shape {list(dims)}"
            )
        found |= {f"{module}.{part}": own for part, own in parts.items()}
    return found


def _check_pairs(checkpoint: Checkpoint) -> None:
    """Refuse indices of rope channel pairs that are out of range or repeated in a head."""
    shape = checkpoint.shape
    half = max(kind.rotary for kind in shape.kinds) // 2
    # -1 stands for a channel that is not rotated, in heads that have such.
    least = -1 if any(0 < kind.rotary < shape.head_dim for kind in shape.kinds) else 0
    for name, place in checkpoint.locations.items():
        if not name.endswith(PAIRS):
            continue
        where = f"{checkpoint.directory.path(place.file)}: tensor {shown(name)}"
        if place.entry.dtype != "I64":
            raise ModelError(f"{where} is {place.entry.dtype}; it must be I64")
        pairs = checkpoint.read(name)  # (kv_heads, kept pairs)
        wrong = pairs[(pairs < least) | (pairs >= half)]
        if wrong.numel():
            raise ModelError(f"{where} has pair {int(wrong[0])}; valid pairs are 0 to {half - 1}")
        rotated = (row[row >= 0] for row in pairs)
        if any(len(row.unique()) != len(row) for row in rotated):
            raise ModelError(f"{where} has a pair twice in one head")


def _check_generation(checkpoint: Checkpoint) -> None:
    """Refuse token ids that would make generation fail after all the work is done."""
    if checkpoint.directory.size(GENERATION) is None:
        return
    where = checkpoint.directory.path(GENERATION)
    for key, value in read_json(checkpoint.directory, GENERATION).items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if key.endswith("_token_id") and not all(type(i) is int for i in ids):
            raise ModelError(f"{where}: {key} is {shown(value)}; it must be a whole number")


def _compressed_shapes(checkpoint: Checkpoint, model: Any) -> dict[str, tuple[int, ...]]:
    """Return tensor -> shape that a compressed checkpoint must contain."""
    state = model.state_dict()
    head = load_family(checkpoint.shape.family).head
    tied = checkpoint.shape.tied and head not in checkpoint.names
    left_out = {*checkpoint.shared, *([head] if tied else [])}
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in left_out}


def _check_tied(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    """Refuse a stored head that differs from the embedding it should be tied to."""
    pairs = zip(checkpoint.read_blocks(embedding), checkpoint.read_blocks(head), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ModelError(
            f"{checkpoint.directory.path('config.json')}: tie_word_embeddings is true, but {head} "
            f"is not {embedding}",
            hint="set tie_word_embeddings to false, or remove the tensor",
        )
