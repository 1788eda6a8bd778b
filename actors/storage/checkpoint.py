"""A Hugging Face checkpoint, checked at the door and read one tensor at a time."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.numerics.packed import all_finite
from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.quoting import shown
from actors.storage.tensors import read_header, read_tensor
from planners.cost import dense_model_form
from planners.errors import ModelError, StorageError
from planners.families import family_of
from planners.families import load as load_family
from planners.plan import ModelForm, ModelShape, model_form_from_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SAMPLED_BLOCKS = 64
SAMPLE_BYTES = 4096
MAX_JSON_BYTES = 10**7  # an index of 90,000 tensors; JSON takes up to 40 times that once parsed
MAX_NAME = 255  # characters
COMPRESSED = "compress_cluster"  # model_type of our own results
BLOCK_BYTES = 2**25  # of a tensor that is read in blocks
# Tables that older programs stored; they follow from the config.
COMPUTED = ".rotary_emb.inv_freq"
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")


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
        _refuse_links_out(self.directory)
        self.config = read_json(self.directory, "config.json")
        self.locations = _locations(self.directory)

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
        outer = family.outer_tensors(replace(shape, tied=False))
        expected = dict(outer.values())
        if shape.tied and family.head not in self.locations:
            del expected[family.head]
        for layer in range(shape.num_layers):
            expected |= dict(family.layer_tensors(shape, layer).values())
        dtypes = {self._checked(name, dims) for name, dims in expected.items()}
        unknown = self.locations.keys() - expected.keys()
        if unknown:
            raise ModelError(
                f"{self.directory.uri}: tensor {shown(min(unknown))} is no part of the model that "
                f"config.json describes, a {model_type} of {shape.num_layers} layers"
            )
        if len(dtypes) > 1:
            raise ModelError(
                f"{self.directory.uri}: weights of several dtypes: {', '.join(sorted(dtypes))}; "
                "one is needed"
            )
        return replace(shape, dtype=dtypes.pop())

    def _original_shape(self) -> ModelShape:
        """Return the shape of the model that this one was made from; the widths are not checked."""
        original = {**self.config, "model_type": self.config.get("compressed_from", "llama")}
        dtypes = {place.entry.dtype for place in self.locations.values()}
        dtype = next((STORED[name] for name in sorted(dtypes & STORED.keys())), "float32")
        return family_of(original["model_type"]).shape_of(original, dtype)

    @functools.cached_property
    def form(self) -> ModelForm:
        """The widths of the model: those of its config, or of one that nothing touched."""
        if self.config.get("model_type") != COMPRESSED:
            return dense_model_form(self.shape)
        return model_form_from_json({
            "layers": self.config["layer_forms"],
            "embedding_dim": self.config["embedding_dim"],
            "head_dim": self.config["head_input_dim"],
            "head_norm_weight": self.config["head_norm_weight"],
            "tied": self.config["tie_word_embeddings"],
            "native": False,
        })  # fmt: skip

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
        if tensor.is_floating_point() and not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"{self.directory.path(location.file)}: tensor {name} has {bad} entries that are "
                "NaN or infinite"
            )
        return tensor

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return role -> tensor of one layer, each checked to be finite.

        A compressed one has roles that a dense one has not, such as ``attn_shortcut.weight``,
        ``rope_pairs`` and ``q_proj.first.weight``, and may lack norms.
        """
        return dict(self.stream_layer(layer))

    def stream_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Yield role and tensor of one layer, one at a time, each checked to be finite."""
        family = load_family(self.shape.family)
        if self.config.get("model_type") == COMPRESSED:
            for name, tensor in self.stream_prefix(family.layer.format(i=layer) + "."):
                yield family.role_of(name), tensor
            return
        for role, (name, _) in family.layer_tensors(self.shape, layer).items():
            yield role, self.read(name)

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin so, by the rest of their names."""
        return dict(self.stream_prefix(prefix))

    def stream_prefix(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """Yield them one at a time, so that each may be converted before the next is read."""
        for name in [name for name in self.locations if name.startswith(prefix)]:
            yield name[len(prefix) :], self.read(name)

    def read_blocks(self, name: str) -> Iterator[Tensor]:
        """Return a tensor in blocks of rows, each checked to be finite."""
        entry = self.locations[name].entry
        if not entry.shape or not entry.size:
            yield self.read(name)
            return
        step = max(1, BLOCK_BYTES * entry.shape[0] // entry.size)
        for start in range(0, entry.shape[0], step):
            yield self.read(name, rows=(start, min(start + step, entry.shape[0])))

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


def read_json(directory: Directory, name: str) -> dict[str, Any]:
    """Return a JSON object from a model directory.

    Raises:
        ModelError: there is none, or it is not a JSON object.
    """
    size = directory.size(name)
    where = directory.path(name)
    if size is None:
        missing = "file" if directory.has_bucket() else "bucket"
        raise ModelError(
            f"{where}: there is no such {missing}", hint="a model directory holds config.json"
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


def _locations(directory: Directory) -> dict[str, Location]:
    """Return tensor -> file and byte range of all tensors, after the index was compared with it."""
    weight_map = _weight_map(directory)
    found: dict[str, Location] = {}
    for file in sorted(set(weight_map.values())) or [SINGLE]:
        for tensor, entry in read_header(directory, file).items():
            if tensor in found:
                raise ModelError(
                    f"{directory.uri}: tensor {shown(tensor)} is in {found[tensor].file} and in "
                    f"{file}"
                )
            found[tensor] = Location(file=file, entry=entry)
    for tensor, file in weight_map.items():
        if tensor not in found or found[tensor].file != file:
            raise ModelError(
                f"{directory.path(INDEX)}: tensor {shown(tensor)} is not in {file} as it says"
            )
    return {name: place for name, place in found.items() if not name.endswith(COMPUTED)}


def _weight_map(directory: Directory) -> Mapping[str, str]:
    """Return tensor -> file as the index says; nothing for weights in a single file."""
    if directory.size(SINGLE) is not None:  # what transformers prefers too
        return {}
    if directory.size(INDEX) is None:
        _explain_missing_weights(directory)
    weight_map = read_json(directory, INDEX).get("weight_map")
    where = directory.path(INDEX)
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{where}: weight_map is missing or empty")
    for tensor, file in weight_map.items():
        _check_name(file, where=f"{where}: {shown(tensor)}")
    for file in sorted(set(weight_map.values())):
        if directory.size(file) is None:
            raise ModelError(f"{where}: names {file}, which does not exist")
    return weight_map


def _check_name(file: object, *, where: str) -> None:
    """Refuse what is no plain name of a file beside the index."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise ModelError(f"{where} is in {shown(file)}; only .safetensors files are read")
    plain = file.isprintable() and not file.startswith(".") and len(file) <= MAX_NAME
    if "/" in file or "\\" in file or not plain:
        raise ModelError(f"{where} is in {shown(file)}; a file of the directory is needed")


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


def _refuse_links_out(directory: Directory) -> None:
    """Refuse links that leave the model, unless they are the Hub cache's own links to its blobs.

    What is read goes into the result, so such a link could carry any file of this machine along.
    """
    if not directory.is_local:
        return
    root = Path(directory.root)
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    for path in (root / name for name in directory.entries()):
        if path.is_symlink() and path.suffix in READ_SUFFIXES:
            real = Path(os.path.realpath(path))  # unlike resolve(), does not raise on a loop
            if not any(real.is_relative_to(home) for home in homes):
                raise ModelError(f"{path}: is a link that leaves the model's directory")
