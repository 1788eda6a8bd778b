"""A result in the deci form: its tensors, FFN units of zeros added, one tensor in memory."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from math import prod
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory, FileEntry
from actors.storage.headers import TensorEntry, header_bytes
from actors.storage.tensors import NAME_OF, TORCH_DTYPE, read_header, read_tensor, tensor_bytes
from planners.errors import StorageError
from planners.families import load as load_family
from planners.serving import DECI_CLASS, QUANTISED, deci_blocks

DECI_CODE = "configuration_deci.py"
# Keys of the original model that mean the same there.
KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters", "attention_bias",
    "attention_dropout", "mlp_bias",
)  # fmt: skip


def deci_config(source: Checkpoint, widths: Sequence[int]) -> dict[str, Any]:
    """Return the ``config.json`` of a result in the deci form."""
    shape, config = source.shape, dict(source.config)
    config.pop("model_type")
    # As transformers completes it: defaults differ between model types.
    whole = CONFIG_MAPPING[shape.model_type](**config).to_dict()
    # A key that says no more than the original model, whose o has no bias.
    own = {"qkv_bias": True} if shape.model_type == "qwen2" else {}
    return {
        **{key: whole[key] for key in KEPT if key in whole},
        **own,
        "architectures": [DECI_CLASS],
        "auto_map": {"AutoConfig": f"{DECI_CODE.removesuffix('.py')}.DeciConfig"},
        "model_type": "nemotron-nas",
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "tie_word_embeddings": source.form.tied,
        "dtype": shape.dtype,
        "block_configs": deci_blocks(shape, tuple(widths)),
        "compression": config.get("compression"),
        **{key: config[key] for key in (QUANTISED,) if key in config},
    }


def deci_code() -> bytes:
    """Return the file that travels with a model in the deci form."""
    return resources.files("actors.modeling").joinpath(DECI_CODE).read_bytes()


def padded_shapes(source: Checkpoint, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return stored tensor -> shape, with FFN widths of so many units.

    What is quantised keeps its shape: `deci_widths` lets no other width through.
    """
    family = load_family(source.shape.family)
    shapes = {name: place.entry.shape for name, place in source.locations.items()}
    for layer, width in enumerate(widths):
        for role, (name, _) in family.layer_tensors(source.shape, layer).items():
            if name not in shapes:
                continue
            if role.startswith(("gate_proj", "up_proj")):
                shapes[name] = (width, *shapes[name][1:])
            elif role == "down_proj.weight":
                shapes[name] = (shapes[name][0], width)
    return shapes


def write_padded(
    source: Checkpoint, target: Directory, widths: Sequence[int]
) -> Iterator[FileEntry]:
    """Write the weight files of a result, as they are named there; yield each one written.

    Added units are zero in all three linears, so that they add nothing: ``act(0) * 0 = 0``.
    """
    shapes = padded_shapes(source, widths)
    files: dict[str, list[str]] = {}
    for name in sorted(source.locations):
        files.setdefault(source.locations[name].file, []).append(name)
    for file, names in sorted(files.items()):
        layout = {name: (NAME_OF[_dtype(source, name)], shapes[name]) for name in names}
        with target.writing(file) as stream:
            stream.write(header_bytes(layout, {"format": "pt"}))
            for name in names:
                stream.write(tensor_bytes(_padded(_read(source, name), shapes[name])))
        yield stream.entry(file)


def check_padded(source: Checkpoint, target: Directory, files: Sequence[FileEntry]) -> None:
    """Read what was written, and compare it with the result it was made from.

    Raises:
        StorageError: a tensor is missing or differs, or an added unit is not zero.
    """
    found: dict[str, tuple[str, TensorEntry]] = {}
    for file in files:
        header = read_header(target, file.path)
        found |= {name: (file.path, entry) for name, entry in header.items()}
    if found.keys() != source.locations.keys():
        raise StorageError(f"{target.uri}: has other tensors than {source.directory.uri}")
    for name, (path, entry) in found.items():
        written, original = read_tensor(target, path, entry), _read(source, name)
        if not torch.equal(written, _padded(original, entry.shape)):
            raise StorageError(
                f"{target.path(path)}: tensor {name} is not the one that was written",
                hint="the disk may be faulty; run the same command with another --out",
            )


def index_of(source: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the index of the weight files."""
    total = sum(prod(shape) * _dtype(source, name).itemsize for name, shape in shapes.items())
    weight_map = {name: source.locations[name].file for name in sorted(shapes)}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _dtype(source: Checkpoint, name: str) -> torch.dtype:
    """Return the dtype of a tensor in the export: the model's, but for what is quantised."""
    if name in source.names:
        return getattr(torch, source.dtype)  # type: ignore[no-any-return]
    return TORCH_DTYPE[source.locations[name].entry.dtype]


def _read(source: Checkpoint, name: str) -> Tensor:
    return source.read(name) if name in source.names else source.read_stored(name)


def _padded(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor with zeros behind its rows and columns."""
    if tensor.shape == tuple(shape):
        return tensor
    wide = tensor.new_zeros(tuple(shape))
    wide[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return wide
