"""What is found out about a checkpoint before a worker or a device is held."""

import torch
from huggingface_hub.errors import StrictDataclassError

from actors.storage.checkpoint import COMPRESSED, Checkpoint, read_json
from actors.storage.quoting import said, shown
from planners.errors import ModelError
from planners.families import load as load_family

CODE = "modeling_compressed.py"  # what our own results bring along
PAIRS = ".rope_pairs"  # which pairs of channels narrower query and key heads kept
GENERATION = "generation_config.json"

# What transformers raises about a config that it cannot take: it promises no class of its own.
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
    """Do to a dense checkpoint what workers will, as far as that is cheap.

    Raises:
        ModelError: it is compressed already or brings code of its own, transformers does not take
            its config, or a head that is said to be the embedding is another.
    """
    if checkpoint.config.get("model_type") == COMPRESSED:
        raise ModelError(
            f"{checkpoint.directory.uri}: is a compressed model already",
            hint="compress the model that it was made from, to a smaller size",
        )
    if checkpoint.directory.size(CODE) is not None:
        raise ModelError(
            f"{checkpoint.directory.path(CODE)}: code that comes with a model is not run",
            hint="remove the file: a model that is not compressed has no use for it",
        )
    shape = checkpoint.shape
    check_classes(checkpoint)
    _check_generation(checkpoint)
    family = load_family(shape.family)
    if shape.tied and family.head in checkpoint.locations:
        _check_tied(checkpoint, family.embedding, family.head)


def check_classes(checkpoint: Checkpoint) -> None:
    """Build a model's classes without memory; see that a compressed one has their tensors.

    Raises:
        ModelError: the config is not one that they can be built from, or a tensor does not fit, or
            holds what no such tensor can.
    """
    from actors.modeling.outer import empty_model  # seconds, for transformers

    where = checkpoint.directory.path("config.json")
    try:
        empty_model(checkpoint.config)
        compressed = checkpoint.config["model_type"] == COMPRESSED
        expected = _compressed_shapes(checkpoint) if compressed else {}
    except _REFUSALS as error:
        raise ModelError(f"{where}: transformers cannot build this model: {said(error)}") from error
    stored = {name: place.entry.shape for name, place in checkpoint.locations.items()}
    wrong = [name for name, dims in expected.items() if stored.get(name) != dims]
    if wrong:
        found = list(stored.get(wrong[0], ())) or "missing"
        raise ModelError(
            f"{where}: asks for tensor {wrong[0]} of shape {list(expected[wrong[0]])}; "
            f"in the weights it is {found}"
        )
    if compressed:
        _check_pairs(checkpoint)


def _check_pairs(checkpoint: Checkpoint) -> None:
    """Refuse pairs of rope channels that a model cannot turn, or would turn twice."""
    half = checkpoint.config["head_dim"] // 2
    for name, place in checkpoint.locations.items():
        if not name.endswith(PAIRS):
            continue
        where = f"{checkpoint.directory.path(place.file)}: tensor {shown(name)}"
        if place.entry.dtype != "I64":
            raise ModelError(f"{where} is {place.entry.dtype}; it must be I64")
        pairs = checkpoint.read(name)  # (kv_heads, kept pairs)
        wrong = pairs[(pairs < 0) | (pairs >= half)]
        if wrong.numel():
            raise ModelError(f"{where} names pair {int(wrong[0])}; pairs are 0 to {half - 1}")
        if any(len(row.unique()) != len(row) for row in pairs):
            raise ModelError(f"{where} names a pair twice in one head")


def _check_generation(checkpoint: Checkpoint) -> None:
    """Refuse ids that generation would trip over once all the work is done."""
    if checkpoint.directory.size(GENERATION) is None:
        return
    where = checkpoint.directory.path(GENERATION)
    for key, value in read_json(checkpoint.directory, GENERATION).items():
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if key.endswith("_token_id") and not all(type(i) is int for i in ids):
            raise ModelError(f"{where}: {key} is {shown(value)}; it must be a whole number")


def _compressed_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Return tensor -> shape of what a compressed checkpoint must hold."""
    from actors.modeling.modeling_compressed import CompressedConfig, CompressedForCausalLM

    config = {k: v for k, v in checkpoint.config.items() if k not in ("model_type", "auto_map")}
    with torch.device("meta"):
        state = CompressedForCausalLM(CompressedConfig(**config)).state_dict()
    head = load_family(checkpoint.shape.family).head
    tied = checkpoint.shape.tied and head not in checkpoint.locations
    return {name: tuple(tensor.shape) for name, tensor in state.items() if name != head or not tied}


def _check_tied(checkpoint: Checkpoint, embedding: str, head: str) -> None:
    """Accept a head that was stored although it is the embedding, where it is that."""
    pairs = zip(checkpoint.read_blocks(embedding), checkpoint.read_blocks(head), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ModelError(
            f"{checkpoint.directory.path('config.json')}: tie_word_embeddings is true, but {head} "
            f"is not {embedding}",
            hint="set tie_word_embeddings to false, or remove the tensor",
        )
