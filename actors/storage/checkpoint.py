"""A Hugging Face checkpoint, validated when it is opened and read one tensor at a time."""

import functools
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from huggingface_hub import constants
from torch import Tensor

from actors.devices.transfer import readers
from actors.modeling.travelling import COMPRESSED
from actors.numerics.packed import all_finite
from actors.storage.contents import CONFIG, config_hash, hasher, remembered, revision_of
from actors.storage.files import Directory
from actors.storage.headers import TensorEntry
from actors.storage.prefetch import in_turn
from actors.storage.quantised import KEY, decoded, part_names, schemes_in
from actors.storage.quoting import shown
from actors.storage.tensors import read_header, read_tensor, tensor_bytes
from planners.errors import ModelError, StorageError
from planners.families import family_of, known_types
from planners.families import load as load_family
from planners.families._base import Family
from planners.model.cost import dense_model_form
from planners.model.form import ModelForm, model_form_from_json
from planners.model.scheme import Scheme
from planners.model.shape import ModelShape
from planners.overflow import overflowed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SMALL_BYTES = 1_000_000_000  # smaller models are hashed anew each time; hashes of others are cached
READERS = 8  # threads that read and hash, at most one per core
MAX_JSON_BYTES = 10**7  # an index of 90,000 tensors; JSON takes up to 40 times that once parsed
MAX_NAME = 255  # characters
BLOCK_BYTES = 2**25  # of one block, where a tensor is read in blocks
# Tables that older programs stored; they follow from the config.
COMPUTED = ".rotary_emb.inv_freq"
READ_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja")
_K = TypeVar("_K")
UNWRAP = (
    "save the unwrapped model: model.module (DDP), model._orig_mod (torch.compile), "
    "model.language_model (multimodal), model.merge_and_unload() (PEFT)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Which file holds a tensor, and where in it."""

    file: str
    entry: TensorEntry


def read_config(directory: Directory) -> dict[str, Any]:
    """Return the ``config.json`` of a model.

    A compressed checkpoint is stored with the original's model type, which its tokenizer needs,
    and with an activation that no stock class accepts. The returned config has our own model type
    and the real activation.
    """
    config = read_json(directory, CONFIG)
    if "layer_forms" not in config:
        return config
    key = family_of(config.get("compressed_from")).activation_key
    return {**config, "model_type": COMPRESSED, key: config.get("activation")}


class NamesCheckpoint(Protocol):
    """A message to a worker that refers to a checkpoint."""

    @property
    def checkpoint_uri(self) -> str:
        """The model directory."""

    @property
    def contents(self) -> Mapping[str, str]:
        """The expected contents (`actors.storage.contents`)."""

    @property
    def model_store(self) -> str:
        """A directory that its links may point into; empty if none."""


class Checkpoint:
    """A model directory whose headers have been read and agree with its config.

    Attributes:
        directory: the model directory.
        config: ``config.json``.
        locations: tensor name -> file and byte range. The names are those of the model with its
            head, even if it was saved without.
    """

    def __init__(
        self,
        uri: str,
        expected: Mapping[str, str] | None = None,
        *,
        model_store: str = "",
        device: str = "cpu",
    ) -> None:
        """Read config, index and headers, but no weights.

        Args:
            uri: the model directory.
            expected: its expected contents, compared as they are read; without any, nothing is
                compared.
            model_store: a directory that its links may point into; none if empty.
            device: that its tensors are read for.

        Raises:
            ModelError: something is missing, broken or unsafe, or the config is not as expected;
                the message names it.
        """
        self.directory = Directory(uri)
        _refuse_links_out(self.directory, model_store)
        self.config = read_config(self.directory)
        self.locations = _whole_names(self.config, _locations(self.directory))
        self._expected = expected or {}
        self._device = device
        self._require(CONFIG, self.directory.path(CONFIG), lambda: config_hash(self.config))

    @classmethod
    def of(cls, message: "NamesCheckpoint", *, device: str = "cpu") -> "Checkpoint":
        """Open the checkpoint that a message refers to, expecting the contents in the message."""
        uri, store = message.checkpoint_uri, message.model_store
        return cls(uri, message.contents, model_store=store, device=device)

    @functools.cached_property
    def shape(self) -> ModelShape:
        """The dimensions of the model, after checking presence, shape and dtype of every tensor.

        Raises:
            ModelError: the family is not supported, or a tensor is missing or has a wrong shape.
        """
        # What it says of matrices that are quantised is known by now.
        left_out = KEY if self.schemes else ""
        config = {key: value for key, value in self.config.items() if key != left_out}
        model_type = config.get("model_type")
        if model_type == COMPRESSED:
            original = {**config, "model_type": config["compressed_from"]}
            return family_of(original["model_type"]).shape_of(original, self.dtype)
        if model_type is None:
            raise ModelError(f"{self.directory.path('config.json')}: model_type is missing")
        family = family_of(model_type)
        shape = family.shape_of(config, "float32")
        outer = family.outer_tensors(replace(shape, tied=False))
        expected = dict(outer.values())
        if shape.tied and family.head not in self.locations:
            del expected[family.head]
        for layer in range(shape.num_layers):
            expected |= dict(family.layer_tensors(shape, layer).values())
        for name, dims in expected.items():
            if name.removesuffix(".weight") not in self.schemes:
                self._check(name, dims, family)
        unknown = self.names - expected.keys()
        if unknown:
            raise ModelError(
                f"{self.directory.uri}: tensor {shown(min(unknown))} does not belong to the model "
                f"that config.json describes, a {model_type} with {shape.num_layers} layers"
                f"{self._other_class(family)}"
            )
        return replace(shape, dtype=self.dtype)

    @functools.cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Module -> how its matrix is quantised; empty for a model that is not."""
        return schemes_in(self.config)

    @functools.cached_property
    def names(self) -> frozenset[str]:
        """The tensors that can be read: for a quantised matrix its weight, not what is stored.

        Where layers share tensors, these have a name in each of the layers.
        """
        stored = frozenset(self.locations.keys() - self._parts.keys())
        return stored | {f"{module}.weight" for module in self.schemes} | self.shared.keys()

    @functools.cached_property
    def shared(self) -> dict[str, str]:
        """The name of each tensor that a layer takes from another -> that under which it is stored.

        No other model than a compressed one has any.
        """
        if self.config.get("model_type") != COMPRESSED:
            return {}
        return load_family(self.shape.family).shared_tensors(self.form)

    @functools.cached_property
    def _parts(self) -> dict[str, str]:
        """Stored tensor -> module, of quantised matrices."""
        return {part: m for m, scheme in self.schemes.items() for part in part_names(m, scheme)}

    @functools.cached_property
    def dtype(self) -> str:
        """The dtype all weights are read in: the stored one, or the config's if there are several.

        transformers loads them the same way, hence so does every user of the input or the result.

        Raises:
            ModelError: several dtypes are stored, and the config's dtype is not one of them.
        """
        names_of: dict[str, list[str]] = {}
        for name, place in self.locations.items():
            if place.entry.dtype in STORED:
                names_of.setdefault(STORED[place.entry.dtype], []).append(name)
        configured = self.config.get("dtype") or self.config.get("torch_dtype")
        if len(names_of) < 2 or configured in [*names_of]:  # noqa: PLR2004 one is no choice
            return str(configured) if len(names_of) > 1 else min(names_of, default="float32")
        most, *_, rare = sorted(names_of, key=lambda dtype: (-len(names_of[dtype]), dtype))
        name = min(names_of[rare])
        raise ModelError(
            f"{self.directory.path(self.locations[name].file)}: tensor {shown(name)} is {rare}, "
            f"others are {most}, and the dtype in config.json is {shown(configured)}",
            hint=f'set "dtype" in config.json to "{most}" or to another stored dtype: weights of '
            "mixed dtypes are all loaded in that one, as in transformers",
        )

    @functools.cached_property
    def form(self) -> ModelForm:
        """The widths of the model: those in its config, or the original ones of a dense model."""
        if self.config.get("model_type") != COMPRESSED:
            return dense_model_form(self.shape)
        return model_form_from_json({
            "layers": self.config["layer_forms"],
            "embedding_dim": self.config["embedding_dim"],
            "head_dim": self.config["head_input_dim"],
            "head_norm_weight": self.config["head_norm_weight"],
            "head_bias": self.config["head_bias"],
            "head_shortcut": self.config["head_shortcut"],
            "tied": self.config["tie_word_embeddings"],
            "native": False,
        })  # fmt: skip

    @functools.cached_property
    def contents(self) -> dict[str, str]:
        """The hashes of config and tensors; all tensors are read and checked to be finite.

        For a model of 1 GB or more they are cached in the user's cache, file by file, for as long
        as the file is unchanged (`actors.storage.contents.remembered`). A file at a commit of the
        Hub is not read: it cannot change, and the hash that the Hub states is used for its tensors.

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
        """The model's identity: sha256 of its contents. Reads the whole model."""
        return revision_of(self.contents)

    @property
    def is_small(self) -> bool:
        """Whether the whole model can be read in about a second."""
        return self.total_bytes < SMALL_BYTES

    def _hashes(self, names: Iterable[str]) -> dict[str, str]:
        def hashed(name: str) -> tuple[str, str]:
            digest = hasher(self.locations[name].entry)
            for block in self._blocks(name, None):
                digest.update(tensor_bytes(block))
                self._converted(
                    block, name
                )  # raises where the model's dtype cannot represent an entry
            return name, digest.hexdigest()

        with ThreadPoolExecutor(min(READERS, os.cpu_count() or 1)) as threads:
            return dict(threads.map(hashed, names))  # an error or Ctrl-C cancels pending reads

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(location.entry.size for location in self.locations.values())

    def read(self, name: str) -> Tensor:
        """Return a tensor, checked to be finite and to have the expected contents.

        Raises:
            ModelError: there is no such tensor, it has NaN or infinite entries, or it changed.
        """
        name = self.shared.get(name, name)
        module = name.removesuffix(".weight")
        if module in self.schemes and name.endswith(".weight"):
            return self._read_quantised(module)
        if name in self.locations and self._is_converted(name):
            return self._read_converted(name)
        return self.read_stored(name)

    def read_stored(self, name: str) -> Tensor:
        """Return a tensor as it is stored; see `read`."""
        tensor = self._read(name, None)

        def found() -> str:
            digest = hasher(self.locations[name].entry)
            digest.update(tensor_bytes(tensor))
            return digest.hexdigest()

        self._require(name, self._where(name), found)
        return tensor

    def _read_quantised(self, module: str) -> Tensor:
        """Return the weights of a quantised matrix, in float32, in which they are exact."""
        scheme = self.schemes[module]
        stored = {name: self.read_stored(name) for name in part_names(module, scheme)}
        (weight,) = decoded(stored, {module: scheme}).values()
        return weight

    def _read_converted(self, name: str) -> Tensor:
        """Return a tensor converted from its stored dtype, without two full copies at a time."""
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
        tensor = read_tensor(
            self.directory, location.file, location.entry, rows=rows, device=self._device
        )
        if tensor.is_floating_point() and tensor.dtype.itemsize > 1:  # of small floats not known
            self._require_finite(tensor, name)
        return tensor

    def _is_converted(self, name: str) -> bool:
        return STORED.get(self.locations[name].entry.dtype, self.dtype) != self.dtype

    def _converted(self, tensor: Tensor, name: str) -> Tensor:
        """Return a tensor in the dtype of the model."""
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
            hint="use the original bfloat16 or float32 weights, before the conversion to float16, "
            "with that dtype in config.json"
            if dtype == "float16"
            else "",
        )

    def _require(self, name: str, where: str, found: Callable[[], str]) -> None:
        """Refuse unexpected contents, so that no result mixes two models."""
        if not self._expected:
            return
        if name in self.locations and self.locations[name].file in self._expected:
            return  # at a commit of the Hub
        if self._expected.get(name) != found():
            raise ModelError(
                f"{where} changed since this run started",
                hint="restore the original model, here and on every machine, and run the same "
                "command again; to compress the changed model, use another --out",
            )

    def read_layer(self, layer: int) -> dict[str, Tensor]:
        """Return role -> tensor of one layer, each checked to be finite.

        A compressed layer has roles that a dense one lacks, such as ``attn_shortcut.weight``,
        ``rope_pairs`` and ``q_proj.first.weight``, and may have no norms.
        """
        return dict(self.stream_layer(layer))

    def stream_layer(self, layer: int) -> Iterator[tuple[str, Tensor]]:
        """Yield role and tensor of one layer, each checked to be finite.

        While one is used the next is read, or the next few for an accelerator.
        """
        family = load_family(self.shape.family)
        if self.config.get("model_type") == COMPRESSED:
            prefix = family.layer.format(i=layer) + "."
            names = {family.role_of(n[len(prefix) :]): n for n in self._names(prefix)}
        else:
            tensors = family.layer_tensors(self.shape, layer)
            names = {role: name for role, (name, _) in tensors.items()}
        return self._stream(names.items())

    def read_prefix(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, keyed by the rest of their names."""
        return dict(self.stream_prefix(prefix))

    def stream_prefix(self, prefix: str, *, shared: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the same tensors one after the other, so that each can be converted first.

        Those that layers take from others are left out unless they are ``shared``.
        """
        names = self._names(prefix)
        left_out = {} if shared else self.shared
        return self._stream((name[len(prefix) :], name) for name in names if name not in left_out)

    def stream_prefixes(
        self, prefixes: Iterable[str]
    ) -> Iterator[tuple[str, Iterator[tuple[str, Tensor]]]]:
        """Yield each prefix with what `stream_prefix` yields; the next one's are read ahead too."""

        def read(prefix: str, name: str) -> tuple[str, tuple[str, Tensor]]:
            return prefix, (name[len(prefix) :], self.read(name))

        names = [(prefix, name) for prefix in prefixes for name in self._names(prefix)]
        reads = (functools.partial(read, *each) for each in names)
        stream = in_turn(reads, ahead=readers(self._device))
        for prefix, found in itertools.groupby(stream, key=operator.itemgetter(0)):
            yield prefix, map(operator.itemgetter(1), found)  # it keeps no tensor, unlike a loop

    def _names(self, prefix: str) -> list[str]:
        return sorted(name for name in self.names if name.startswith(prefix))

    def _stream(self, names: Iterable[tuple[_K, str]]) -> Iterator[tuple[_K, Tensor]]:
        """Yield key and tensor of each (key, name), in order."""

        def read(key: _K, name: str) -> tuple[_K, Tensor]:
            return key, self.read(name)

        reads = (functools.partial(read, key, name) for key, name in names)
        return in_turn(reads, ahead=readers(self._device))

    def read_blocks(self, name: str, *, rows: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor in blocks of rows, checked like `read`; its hash is checked at the end.

        Args:
            name: of the tensor.
            rows: per block; by default as many as fit into 32 MiB.
        """
        if name.removesuffix(".weight") in self.schemes:
            yield from torch.split(self.read(name), rows or 2**31)
            return
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
                f"{list(location.entry.shape)}; config.json requires {list(dims)}"
            )
        if location.entry.dtype not in STORED:
            raise ModelError(
                f"{self.directory.path(location.file)}: tensor {name} is {location.entry.dtype}; "
                f"supported: {', '.join(STORED)}",
                hint="quantised checkpoints cannot be compressed; use the original weights",
            )

    def _missing(self, name: str, family: Family) -> ModelError:
        """Return an error that explains why a tensor is missing, judging by the other names."""
        where = self.directory.uri
        for stored in sorted(self.locations):
            more = _more_parts(stored, name)
            if more:
                return ModelError(
                    f"{where}: tensor {name} is stored as {shown(stored)}: {shown('.'.join(more))} "
                    "in the names comes from a wrapper around the model",
                    hint=UNWRAP,
                )
        if name == family.head:
            return ModelError(
                f"{where}: the model has no head: tensor {name} is missing, and "
                f"tie_word_embeddings is false{self._other_class(family)}",
                hint="a causal language model is needed, as AutoModelForCausalLM saves it; if its "
                "head is tied to its embedding, set tie_word_embeddings to true in config.json",
            )
        return ModelError(f"{where}: tensor {name} is missing from the weights")

    def _other_class(self, family: Family) -> str:
        """Return the end of a message: which class the config names instead of one with a head.

        ``architectures`` is otherwise ignored, as transformers ignores it.
        """
        known = family.classes[self.config["model_type"]]
        named = self.config.get("architectures")
        if not named or named == [known]:
            return ""
        return f"; architectures in config.json is {shown(named)}, but {known} is needed"


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
            f"{where}: there is no such {missing}",
            hint="a model directory must contain config.json",
        )
    if size > MAX_JSON_BYTES:
        raise ModelError(
            f"{where}: is {size} bytes, too large for a model's JSON file (limit {MAX_JSON_BYTES})"
        )
    try:
        data = json.loads(directory.read(name))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"{where}: not a JSON object")
    return data


def _whole_names(config: Mapping[str, Any], locations: dict[str, Location]) -> dict[str, Location]:
    """Return locations keyed by names of the full model, even if it was saved without its head."""
    families = [f for t, f in known_types().items() if t == config.get("model_type")]
    if not families or families[0].embedding in locations:
        return locations
    renamed = {families[0].with_base(name): place for name, place in locations.items()}
    return renamed if len(renamed) == len(locations) else locations


def _more_parts(stored: str, name: str) -> tuple[str, ...]:
    """Return the extra parts of ``stored`` over ``name``; empty where it lacks a part of it."""
    rest, more = name.split("."), []
    for part in stored.split("."):
        if rest and part == rest[0]:
            rest.pop(0)
        else:
            more.append(part)
    return () if rest or any(part.isdigit() for part in more) else tuple(more)


def _locations(directory: Directory) -> dict[str, Location]:
    """Return tensor -> file and byte range of all tensors, checked against the index."""
    weight_map = _weight_map(directory)
    found: dict[str, Location] = {}
    for file in sorted(set(weight_map.values())) or [SINGLE]:
        for tensor, entry in read_header(directory, file).items():
            if tensor in found:
                raise ModelError(
                    f"{directory.uri}: tensor {shown(tensor)} is in both {found[tensor].file} and "
                    f"{file}"
                )
            found[tensor] = Location(file=file, entry=entry)
    for tensor, file in weight_map.items():
        if tensor not in found or found[tensor].file != file:
            raise ModelError(
                f"{directory.path(INDEX)}: tensor {shown(tensor)} is not in {file} as listed"
            )
    return {name: place for name, place in found.items() if not name.endswith(COMPUTED)}


def _weight_map(directory: Directory) -> Mapping[str, str]:
    """Return tensor -> file from the index; empty for weights in a single file."""
    if directory.size(SINGLE) is not None:  # transformers prefers it too
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
            raise ModelError(f"{where}: refers to {file}, which does not exist")
    return weight_map


def _check_name(file: object, *, where: str) -> None:
    """Refuse anything but the plain name of a file beside the index."""
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise ModelError(f"{where} is in {shown(file)}; only .safetensors files are supported")
    plain = file.isprintable() and not file.startswith(".") and len(file) <= MAX_NAME
    if "/" in file or "\\" in file or not plain:
        raise ModelError(f"{where} is in {shown(file)}; the file must be in the model directory")


def _explain_missing_weights(directory: Directory) -> None:
    for name in (SINGLE, INDEX) if directory.is_local else ():
        path = Path(directory.path(name))
        if path.is_symlink():
            raise ModelError(
                f"{path}: is a link to {shown(os.path.realpath(path))}, which does not exist on "
                "this machine",
                hint="every machine that works on the model needs access to it: mount it, or copy "
                "the file into the model's directory",
            )
    try:
        names = directory.names()
    except StorageError:
        names = []
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles:
        raise ModelError(
            f"{directory.uri}: has only pickle weights ({pickles[0]}), which can run code when "
            "loaded and are never read",
            hint="convert them: model.save_pretrained(DIR, safe_serialization=True)",
        )
    raise ModelError(f"{directory.uri}: has a config.json but no weights ({SINGLE} or {INDEX})")


def _refuse_links_out(directory: Directory, model_store: str) -> None:
    """Refuse links that leave the model, unless they point into its store or the Hub's cache.

    What is read goes into the result, so such a link could leak any file of this machine.
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
                f"{path}: is a link to {shown(str(real))}, outside the model's directory",
                hint="copy the file into that directory, or allow the link: --model-store "
                f"{real.parent} (in a recipe model_store)",
            )


def _is_blob(path: Path, real: Path) -> bool:
    """Return whether a link points to a file of the Hub's cache, as old downloads to a folder did.

    Such a file is named by the hash of its content, so only someone who has it can refer to it.
    """
    cache = Path(os.path.realpath(constants.HF_HUB_CACHE))
    parts = real.relative_to(cache).parts if real.is_relative_to(cache) else ()
    is_blob = len(parts) == 3 and parts[0].startswith("models--") and parts[1] == "blobs"  # noqa: PLR2004 repository, blobs, hash
    return is_blob and path.readlink().name == real.name
