"""A Hugging Face checkpoint, checked at the door and read one tensor at a time."""

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.tensors import NAME_OF, read_header, read_tensor
from planners.errors import ModelError, StorageError
from planners.families import family_of
from planners.families import load as load_family
from planners.plan import ModelShape

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SAMPLED_BLOCKS = 64
SAMPLE_BYTES = 4096
MAX_JSON_BYTES = 64_000_000
COMPRESSED = "compress_cluster"  # model_type of our own results
DOOR_BYTES = 1_000_000_000  # below this, values are checked before anything starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Which file holds a tensor, and where in it."""

    file: str
    entry: TensorEntry


class Checkpoint:
    """A model directory whose headers have been read and agree with its config.

    Attributes:
        directory: where it lies.
        config: ``config.json``.
        locations: tensor name -> file and byte range.
    """

    def __init__(self, uri: str) -> None:
        """Read config, index and headers; no weight is read.

        Raises:
            ModelError: something is missing, broken or unsafe; the message names it.
        """
        self.directory = Directory(uri)
        self.config = read_json(self.directory, "config.json")
        self.locations = {
            tensor: Location(file=file, entry=entry)
            for file in _weight_files(self.directory)
            for tensor, entry in read_header(self.directory, file).items()
        }
        self._check_index()

    @functools.cached_property
    def shape(self) -> ModelShape:
        """The model's integers, after every tensor's presence, shape and dtype were checked.

        Raises:
            ModelError: the family is not supported, or a tensor is missing or of a wrong shape.
        """
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str):
            raise ModelError(f"{self.directory.path('config.json')}: model_type is missing")
        if model_type == COMPRESSED:
            return self._original_shape()
        family = family_of(model_type)
        shape = family.shape_of(self.config, "float32")
        expected = dict(family.outer_tensors(shape).values())
        for layer in range(shape.num_layers):
            expected |= dict(family.layer_tensors(shape, layer).values())
        dtypes = {self._checked(name, dims) for name, dims in expected.items()}
        if len(dtypes) > 1:
            raise ModelError(f"weights of several dtypes: {', '.join(sorted(dtypes))}")
        return family.shape_of(self.config, dtypes.pop())

    def _original_shape(self) -> ModelShape:
        """Return the shape of the model that this one was made from; the widths are not checked."""
        original = {**self.config, "model_type": self.config.get("compressed_from", "llama")}
        dtype = next(iter(self.locations.values())).entry.dtype
        return family_of(original["model_type"]).shape_of(original, STORED.get(dtype, "float32"))

    @functools.cached_property
    def revision(self) -> str:
        """Sha256 of config, headers, sizes and 64 sampled blocks a file: the model's identity."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for file in sorted({location.file for location in self.locations.values()}):
            size = self.directory.size(file) or 0
            digest.update(f"{file} {size}".encode())
            # Evenly spaced, header included: a different model differs in nearly every block.
            starts = np.linspace(0, max(size - SAMPLE_BYTES, 0), SAMPLED_BLOCKS).astype(int)
            for start in dict.fromkeys(starts.tolist()):
                length = min(SAMPLE_BYTES, size - start)
                digest.update(self.directory.read_range(file, start, length))
        return digest.hexdigest()

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(location.entry.size for location in self.locations.values())

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """Return a tensor, or rows ``[a, b)`` of it, checked to be finite.

        Raises:
            ModelError: there is no such tensor, or it has NaN or infinite entries.
        """
        if name not in self.locations:
            raise ModelError(f"{self.directory.path(name)}: the checkpoint has no such tensor")
        location = self.locations[name]
        tensor = read_tensor(self.directory, location.file, location.entry, rows=rows)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{self.directory.path(location.file)}: tensor {name} has {bad} entries that are "
                "NaN or infinite"
            )
        return tensor

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return role -> tensor of one layer, each checked to be finite."""
        names = load_family(self.shape.family).layer_tensors(self.shape, layer)
        return {role: self.read(name) for role, (name, _) in names.items()}

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so, by the rest of their names."""
        names = [name for name in self.locations if name.startswith(prefix)]
        return {name[len(prefix) :]: self.read(name) for name in names}

    def check_values(self) -> None:
        """Read every tensor of a small checkpoint; a large one is checked as workers read it.

        Raises:
            ModelError: a tensor has NaN or infinite entries.
        """
        if self.total_bytes < DOOR_BYTES:
            for name in self.locations:
                self.read(name)

    def _checked(self, name: str, dims: tuple[int, ...]) -> str:
        location = self.locations.get(name)
        if location is None:
            raise ModelError(f"{self.directory.uri}: tensor {name} is missing from the weights")
        if location.entry.shape != dims:
            raise ModelError(
                f"{self.directory.path(location.file)}: tensor {name} has shape "
                f"{list(location.entry.shape)}; config.json asks for {list(dims)}"
            )
        if location.entry.dtype not in STORED:
            raise ModelError(
                f"{self.directory.path(location.file)}: tensor {name} is {location.entry.dtype}; "
                f"supported: {', '.join(STORED)}",
                hint="quantised checkpoints cannot be compressed; use the original weights",
            )
        return STORED[location.entry.dtype]

    def _check_index(self) -> None:
        for tensor, file in _weight_map(self.directory).items():
            held = self.locations.get(tensor)
            if held is None or held.file != file:
                raise ModelError(
                    f"{self.directory.path(INDEX)}: tensor {tensor} is not in {file} as it says"
                )


def read_json(directory: Directory, name: str) -> dict[str, Any]:
    """Return a JSON object from a model directory.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    size = directory.size(name)
    where = directory.path(name)
    if size is None:
        raise ModelError(
            f"{where}: there is no such file", hint="a model directory holds config.json"
        )
    if size > MAX_JSON_BYTES:
        raise ModelError(f"{where}: {size} bytes are too many for a JSON file of a model")
    try:
        data = json.loads(directory.read(name))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{where}: not a JSON object")
    return data


def dtype_name(tensor: Tensor) -> str:
    """Return the safetensors name of a tensor's dtype."""
    return NAME_OF[tensor.dtype]


def _weight_map(directory: Directory) -> Mapping[str, str]:
    if directory.size(INDEX) is None:
        return {}
    weight_map = read_json(directory, INDEX).get("weight_map")
    where = directory.path(INDEX)
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{where}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise ModelError(f"{where}: {tensor} is in {file!r}; only .safetensors files are read")
        if "/" in file or "\\" in file or file.startswith("."):
            raise ModelError(f"{where}: {tensor} is in {file!r}; a file of the directory is needed")
    return weight_map


def _weight_files(directory: Directory) -> list[str]:
    files = sorted(set(_weight_map(directory).values()))
    if not files:
        if directory.size(SINGLE) is None:
            _explain_missing_weights(directory)
        files = [SINGLE]
    for file in files:
        _refuse_escape(directory, file)
        if directory.size(file) is None:
            raise ModelError(f"{directory.path(INDEX)}: names {file}, which does not exist")
    return files


def _explain_missing_weights(directory: Directory) -> None:
    try:
        names = directory.names()
    except StorageError:
        names = []
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ModelError(
            f"{directory.uri}: only pickle weights ({pickles[0]}); they can run code when loaded "
            "and are not read",
            hint="convert them: model.save_pretrained(DIR, safe_serialization=True)",
        )
    raise ModelError(f"{directory.uri}: has a config.json but no weights ({SINGLE} or {INDEX})")


def _refuse_escape(directory: Directory, file: str) -> None:
    """Refuse a link that leaves the model, unless it is the Hub cache's own link to its blobs."""
    if not directory.is_local:
        return
    root, real = Path(directory.root), (Path(directory.root) / file).resolve()
    inside = real.is_relative_to(root) or (
        root.parent.name == "snapshots" and real.is_relative_to(root.parent.parent / "blobs")
    )
    if not inside:
        raise ModelError(f"{root / file}: is a link that leaves the model's directory")
