"""A Hugging Face checkpoint, checked at the door and read one tensor at a time."""

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import constants
from torch import Tensor

from actors.numerics.packed import all_finite
from actors.storage.contents import CONFIG, config_hash, hasher, remembered, revision_of
from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.quoting import shown
from actors.storage.tensors import read_header, read_tensor, tensor_bytes
from planners.errors import ModelError, StorageError
from planners.families import family_of, known_types
from planners.families import load as load_family
from planners.families._base import Family
from planners.model.cost import dense_model_form
from planners.model.form import ModelForm, model_form_from_json
from planners.model.shape import ModelShape
from planners.overflow import overflowed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SMALL_BYTES = 1_000_000_000  # a model below is read each time; of a larger one hashes are kept
READERS = 8  # threads that read and hash, if there are so many cores
MAX_JSON_BYTES = 10**7  # an index of 90,000 tensors; JSON takes up to 40 times that once parsed
MAX_NAME = 255  # characters
COMPRESSED = "compress_cluster"  # model_type of our own results, once they are read
BLOCK_BYTES = 2**25  # of a tensor that is read in blocks
# Tables that older programs stored; they follow from the config.
COMPUTED = ".rotary_emb.inv_freq"
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
UNWRAP = (
    "save the model inside its wrapper: model.module (DDP), model._orig_mod (torch.compile), "
    "model.language_model (of a multimodal model), model.merge_and_unload() (PEFT)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Which file holds a tensor, and where in it."""

    file: str
    entry: TensorEntry


def read_config(directory: Directory) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    One of ours is stored under the original's model type, as its tokenizer needs it, with an
    activation that no stock class knows; here it has a model type of its own, and its activation.
    """
    config = read_json(directory, CONFIG)
    if "layer_forms" not in config:
        return config
    return {**config, "model_type": COMPRESSED, "hidden_act": config.get("activation")}


class NamesCheckpoint(Protocol):
    """A message to a worker that names a checkpoint."""

    @property
    def checkpoint_uri(self) -> str:
        """The model directory."""

    @property
    def contents(self) -> Mapping[str, str]:
        """Its contents as they must be (`actors.storage.contents`)."""

    @property
    def model_store(self) -> str:
        """A directory that links in it may lead into, or empty."""


class Checkpoint:
    """A model directory whose headers have been read and agree with its config.

    Attributes:
        directory: where it lies.
        config: ``config.json``.
        locations: tensor name -> file and byte range. The names are those of the model with its
            head, also where it was saved without.
    """

    def __init__(
        self, uri: str, expected: Mapping[str, str] | None = None, *, model_store: str = ""
    ) -> None:
        """Read config, index and headers; no weight is read.

        Args:
            uri: the model directory.
            expected: its contents as they must be. They are compared as they are read; without
                any, whatever is there is taken.
            model_store: a directory that links in it may lead into; none if empty.

        Raises:
            ModelError: something is missing, broken or unsafe, or the config is not as expected;
                the message names it.
        """
        self.directory = Directory(uri)
        _refuse_links_out(self.directory, model_store)
        self.config = read_config(self.directory)
        self.locations = _whole_names(self.config, _locations(self.directory))
        self._expected = expected or {}
        self._require(CONFIG, self.directory.path(CONFIG), lambda: config_hash(self.config))

    @classmethod
    def of(cls, message: "NamesCheckpoint") -> "Checkpoint":
        """Open the checkpoint that a message to a worker names, as the message says it must be."""
        return cls(message.checkpoint_uri, message.contents, model_store=message.model_store)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """The model's integers, after every tensor's presence, shape and dtype were checked.

        Raises:
            ModelError: the family is not supported, or a tensor is missing or of a wrong shape.
        """
        model_type = self.config.get("model_type")
        if model_type == COMPRESSED:
            original = {**self.config, "model_type": self.config.get("compressed_from", "llama")}
            return family_of(original["model_type"]).shape_of(original, self.dtype)
        if model_type is None:
            raise ModelError(f"{self.directory.path('config.json')}: model_type is missing")
        family = family_of(model_type)
        shape = family.shape_of(self.config, "float32")
        outer = family.outer_tensors(replace(shape, tied=False))
        expected = dict(outer.values())
        if shape.tied and family.head not in self.locations:
            del expected[family.head]
        for layer in range(shape.num_layers):
            expected |= dict(family.layer_tensors(shape, layer).values())
        for name, dims in expected.items():
            self._check(name, dims, family)
        unknown = self.locations.keys() - expected.keys()
        if unknown:
            raise ModelError(
                f"{self.directory.uri}: tensor {shown(min(unknown))} is no part of the model that "
                f"config.json describes, a {model_type} of {shape.num_layers} layers"
                f"{self._other_class(family)}"
            )
        return replace(shape, dtype=self.dtype)

    @functools.cached_property
    def dtype(self) -> str:
        """What all weights are read in: as they are stored, or in the config's dtype where several.

        So transformers loads them, and with it whoever uses the input or the result.

        Raises:
            ModelError: they are of several, and the config's dtype is none of these.
        """
        of: dict[str, list[str]] = {}
        for name, place in self.locations.items():
            if place.entry.dtype in STORED:
                of.setdefault(STORED[place.entry.dtype], []).append(name)
        asked = self.config.get("dtype") or self.config.get("torch_dtype")
        if len(of) < 2 or asked in [*of]:  # noqa: PLR2004 one is no choice
            return str(asked) if len(of) > 1 else min(of, default="float32")
        most, *_, rare = sorted(of, key=lambda dtype: (-len(of[dtype]), dtype))
        name = min(of[rare])
        raise ModelError(
            f"{self.directory.path(self.locations[name].file)}: tensor {shown(name)} is {rare}, "
            f"others are {most}, and the dtype of config.json is {shown(asked)}",
            hint=f'set "dtype" in config.json to "{most}", or to another that is stored: weights '
            "of several dtypes are all read in that one, as transformers does",
        )

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
    def contents(self) -> dict[str, str]:
        """The hashes of config and tensors, which are all read for them and checked to be finite.

        Of a model of 1 GB or more they are kept in the user's cache, file by file, for as long as
        nothing touches the file (`actors.storage.contents.remembered`). A file at a commit of the
        Hub is not read: it cannot change, and the hash that the Hub states stands for its tensors.

        Raises:
            ModelError: a tensor has NaN or infinite entries.
        """
        files: dict[str, list[str]] = {}
        for name, place in sorted(self.locations.items(), key=lambda item: item[1].entry.start):
            files.setdefault(place.file, []).append(name)
        found = {CONFIG: config_hash(self.config)}
        for file, names in sorted(files.items()):
            if stated := self.directory.stated_sha256(file):
                found[file] = stated
            elif self.is_small:
                found |= self._hashes(names)
            else:
                hashed = functools.partial(self._hashes, names)
                found |= remembered(self.directory, file, names, hashed)
        return found

    @property
    def revision(self) -> str:
        """The model's identity: sha256 of its contents, for which all of it is read."""
        return revision_of(self.contents)

    @property
    def is_small(self) -> bool:
        """All of it can be read in about a second."""
        return self.total_bytes < SMALL_BYTES

    def _hashes(self, names: Iterable[str]) -> dict[str, str]:
        def hashed(name: str) -> tuple[str, str]:
            digest = hasher(self.locations[name].entry)
            for block in self._blocks(name, None):
                digest.update(tensor_bytes(block))
                self._converted(block, name)  # refuses what the model's dtype cannot hold
            return name, digest.hexdigest()

        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as threads:
            return dict(threads.map(hashed, names))  # an error or Ctrl-C cancels what waits

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(location.entry.size for location in self.locations.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor, checked to be finite and what is expected.

        Raises:
            ModelError: there is no such tensor, it has NaN or infinite entries, or it changed.
        """
        if name in self.locations and self._is_converted(name):
            return self._read_converted(name)
        tensor = self._read(name, None)

        def found() -> str:
            digest = hasher(self.locations[name].entry)
            digest.update(tensor_bytes(tensor))
            return digest.hexdigest()

        self._require(name, self._where(name), found)
        return tensor

    def _read_converted(self, name: str) -> Tensor:
        """Return a tensor that is stored in another dtype; it is never whole in both."""
        found = torch.empty(self.locations[name].entry.shape, dtype=getattr(torch, self.dtype))
        start = 0
        for block in self.read_blocks(name):
            if not block.ndim:
                return block
            found[start : start + len(block)] = block
            start += len(block)
        return found

    def _read(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        if name not in self.locations:
            raise ModelError(f"{self.directory.path(name)}: the checkpoint has no such tensor")
        location = self.locations[name]
        tensor = read_tensor(self.directory, location.file, location.entry, rows=rows)
        if tensor.is_floating_point():
            self._require_finite(tensor, name)
        return tensor

    def _is_converted(self, name: str) -> bool:
        return STORED.get(self.locations[name].entry.dtype, self.dtype) != self.dtype

    def _converted(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor in the dtype of the model, where it is stored in another."""
        if not self._is_converted(name):
            return tensor
        tensor = tensor.to(getattr(torch, self.dtype))
        self._require_finite(tensor, name)
        return tensor

    def _require_finite(self, tensor: Tensor, name: str) -> None:
        if all_finite(tensor):
            return
        bad = int((~torch.isfinite(tensor)).sum())
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"{self._where(name)} has {bad} entries that are NaN or infinite{overflowed(dtype)}",
            hint="use the bfloat16 or float32 weights that these were converted from, with that "
            "dtype in config.json"
            if dtype == "float16"
            else "",
        )

    def _require(self, name: str, where: str, found: Callable[[], str]) -> None:
        """Refuse what is not as expected, so that no result is made of two models."""
        if not self._expected:
            return
        if name in self.locations and self.locations[name].file in self._expected:
            return  # at a commit of the Hub
        if self._expected.get(name) != found():
            raise ModelError(
                f"{where} is not what it was when this run began with the model",
                hint="put back the model that it was, here and on every machine, and run the same "
                "command again; for the model as it is now, use another --out",
            )

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

    def read_blocks(self, name: str, *, rows: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor in blocks of rows, checked as `read` does, the whole of it at its end.

        Args:
            name: of the tensor.
            rows: of a block; as many as are 32 MiB, if not given.
        """
        digest = hasher(self.locations[name].entry)
        for block in self._blocks(name, rows):
            if self._expected:
                digest.update(tensor_bytes(block))
            yield self._converted(block, name)
        self._require(name, self._where(name), digest.hexdigest)

    def _where(self, name: str) -> str:
        return f"{self.directory.path(self.locations[name].file)}: tensor {name}"

    def _blocks(self, name: str, rows: int | None) -> Iterator[Tensor]:
        entry = self.locations[name].entry
        if not entry.shape or not entry.size:
            yield self._read(name, None)
            return
        step = rows or max(1, BLOCK_BYTES * entry.shape[0] // entry.size)
        for start in range(0, entry.shape[0], step):
            yield self._read(name, (start, min(start + step, entry.shape[0])))

    def _check(self, name: str, dims: tuple[int, ...], family: Family) -> None:
        location = self.locations.get(name)
        if location is None:
            raise self._missing(name, family)
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

    def _missing(self, name: str, family: Family) -> ModelError:
        """Return why a tensor is missing, as far as the names of others tell."""
        where = self.directory.uri
        for stored in sorted(self.locations):
            more = _more_parts(stored, name)
            if more:
                return ModelError(
                    f"{where}: tensor {name} is stored as {shown(stored)}: {shown('.'.join(more))} "
                    "in the names is of a wrapper around the model",
                    hint=UNWRAP,
                )
        if name == family.head:
            return ModelError(
                f"{where}: the model has no head: tensor {name} is missing, and "
                f"tie_word_embeddings is false{self._other_class(family)}",
                hint="a model that predicts tokens is needed, as AutoModelForCausalLM saves it; if "
                "its head is its embedding, set tie_word_embeddings to true in config.json",
            )
        return ModelError(f"{where}: tensor {name} is missing from the weights")

    def _other_class(self, family: Family) -> str:
        """Return the class that the config names for the weights, where it is not one with a head.

        ``architectures`` decides nothing: transformers does not go by it either.
        """
        known = family.classes[self.config["model_type"]]
        named = self.config.get("architectures")
        if not named or named == [known]:
            return ""
        return f"; its architectures are {shown(named)}, and {known} is needed"


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


def _whole_names(config: Mapping[str, Any], locations: dict[str, Location]) -> dict[str, Location]:
    """Return locations by the names of the whole model, also of one saved without its head."""
    families = [f for t, f in known_types().items() if t == config.get("model_type")]
    if not families or families[0].embedding in locations:
        return locations
    renamed = {families[0].with_base(name): place for name, place in locations.items()}
    return renamed if len(renamed) == len(locations) else locations


def _more_parts(stored: str, name: str) -> tuple[str, ...]:
    """Return what a name has between the parts of another; nothing where it lacks one of them."""
    rest, more = name.split("."), []
    for part in stored.split("."):
        if rest and part == rest[0]:
            rest.pop(0)
        else:
            more.append(part)
    return () if rest or any(part.isdigit() for part in more) else tuple(more)


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
    for name in (SINGLE, INDEX) if directory.is_local else ():
        path = Path(directory.path(name))
        if path.is_symlink():
            raise ModelError(
                f"{path}: is a link to {shown(os.path.realpath(path))}, which does not exist on "
                "this machine",
                hint="every machine that works on the model must see it: mount it there, or copy "
                "the file into the model's directory",
            )
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


def _refuse_links_out(directory: Directory, model_store: str) -> None:
    """Refuse links that leave the model, unless they lead into its store or the Hub's cache.

    What is read goes into the result, so such a link could carry any file of this machine along.
    """
    if not directory.is_local:
        return
    root = Path(directory.root)
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if model_store:
        homes.append(Path(model_store))
    for path in (root / name for name in directory.entries()):
        if path.is_symlink() and path.suffix in READ_SUFFIXES:
            real = Path(os.path.realpath(path))  # unlike resolve(), does not raise on a loop
            if any(real.is_relative_to(home) for home in homes) or _is_blob(path, real):
                continue
            raise ModelError(
                f"{path}: is a link that leaves the model's directory, to {shown(str(real))}",
                hint=f"copy the file there, or allow it: --model-store {real.parent} (in a recipe "
                "model_store)",
            )


def _is_blob(path: Path, real: Path) -> bool:
    """Return whether a link names a file of the Hub's cache, as old downloads to a folder made.

    Such a file is named by the hash of its content: whoever can name it knows it.
    """
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    parts = real.relative_to(cache).parts if real.is_relative_to(cache) else ()
    is_blob = len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "blobs"  # noqa: PLR2004 repository, blobs, hash
    return is_blob and path.readlink().name == real.name
