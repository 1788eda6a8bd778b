"""Units that recover a compressed model: layers trained alone, and the copies of what is kept.

Trained alone, a layer learns what the layer of the input model makes of its own inputs. These pass
the layers of that model one after the other, in a few shards of the tokens, and are on disk between
two of them; a layer is trained as soon as its inputs and outputs are. Where the method rotated the
residual stream, both are taken into the bases of the compressed layer.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from actors import methods
from actors.devices.memory import return_large_blocks
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.modeling.outer_model import OuterModel
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory, FileEntry
from actors.storage.records import Record, read_record
from actors.storage.tensors import (
    StoredTensors,
    damaged,
    map_tensors,
    read_header,
    read_tensors,
    require_finite,
    write_tensors,
    write_weights,
)
from actors.storage.tokens import tokens_from_parquet
from actors.training.checkpoints import Checkpoints
from actors.training.course import recorded
from actors.training.local import LayerData, train_layer
from actors.training.resume import Durability
from planners.calibration import shard_cuts
from planners.canonical_json import fingerprint, to_json
from planners.families import load as load_family
from planners.recovery import SHARDS, SHRUNK, TRAINED

COPY_BYTES = 2**25  # of a file that is copied, in memory at one time
HIDDEN = "hidden"


@torch.inference_mode()
def inputs(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write the activations before a layer of the input model, for one shard of the tokens."""
    layer, shard = divmod(task.index, SHARDS)
    ids = torch.from_numpy(tokens_from_parquet(run.read(job.tokens)))
    rows = slice(*shard_cuts(SHARDS, len(ids))[shard])
    checkpoint, family = Checkpoint.of(job), load_family(job.shape.family)
    dtype = getattr(torch, job.batching.dtype)
    outer = OuterModel(checkpoint.config, family, dtype=dtype, device=reads.device)
    size = job.batching.microbatch_sequences
    if layer == 0:
        outer.read_embedding(checkpoint)
        found = [outer.embed(part).cpu() for part in torch.split(ids[rows], size)]
    else:
        before = layer - 1
        prefix = family.layer.format(i=before) + "."
        module = outer.layer(before, checkpoint.stream_prefix(prefix))
        found = []
        for part in torch.split(_hidden(run, task.inputs[0]), size):
            hidden = part.to(reads.device)
            arguments = outer.layer_arguments(hidden)[before]
            found.append(module(hidden, **arguments).cpu())
    tensors = {HIDDEN: torch.cat(found)}
    require_finite(tensors[HIDDEN])
    return (write_tensors(run, f"boundary/{task.unit}.safetensors", tensors),), {}


def layer(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Train one layer to the outputs of the layer that it was made from."""
    assert job.recovery is not None  # else there is no such unit
    return_large_blocks()
    shrunk, *others = task.inputs
    record = read_record(run, shrunk)
    # Ordinary tensors: those that a unit makes in its inference mode can have no gradients.
    with torch.inference_mode(mode=False):
        compressed = _Compressed(record, job, run, reads.device, index=task.index)
        data = _data(others, job, run, reads, layer=compressed, index=task.index)
        dense = reads.checkpoint(job).read_prefix(compressed.prefix)
        # What the layer was made of, its bases or statistics, is in the fingerprint of it.
        key = [read_record(run, name).fingerprint for name in (shrunk, *others[: 2 * SHARDS])]
        key_of_all = fingerprint({"inputs": key, "recovery": to_json(job.recovery)})
        checkpoints = Checkpoints(run, task.unit, key_of_all)
        course, trained = train_layer(
            compressed.module,
            dense,
            data,
            job.recovery,
            Durability(checkpoints=checkpoints, save_every=job.save_steps),
            frozen=compressed.shared,
        )
    named = {compressed.prefix + name: tensor for name, tensor in trained.items()}
    files, values = _exported(record, named, run)
    checkpoints.remove()
    return files, {**values, "recovery": recorded(course) if trained else {}}


def _data(
    names: Sequence[str],
    job: CompressionJob,
    run: Directory,
    reads: Reads,
    *,
    layer: "_Compressed",
    index: int,
) -> LayerData:
    """Return the inputs and outputs of a layer of the input model, in the bases of the result."""
    how, form = job.recovery, job.form.layers[index]
    assert how is not None  # see `layer`
    before = _Stream([_hidden(run, name) for name in names[:SHARDS]], reads.device)
    after = _Stream([_hidden(run, name) for name in names[SHARDS : 2 * SHARDS]], reads.device)
    if methods.spec(job.method).residual:
        bases = reads.bases(tuple(names[2 * SHARDS :]), run)
        centred = job.shape.is_centred
        before.axes = _axes(bases[0], form.residual_in, centred=centred)
        after.axes = _axes(bases[-1], form.residual_out, centred=centred)
    return LayerData(
        forward=layer,
        inputs=before.rows,
        targets=after.rows,
        num_sequences=how.sequences,
        length=how.length,
    )


def _axes(basis: Tensor, width: int, *, centred: bool) -> Tensor:
    """Return the map of the residual stream into a basis, (hidden, width), in float32."""
    kept = basis[:, :width]
    kept = kept - kept.mean(0) if centred else kept  # what a centred stream loses
    return kept.clone().to(torch.float32)


class _Stream:
    """Activations of all sequences, in shards; the sequences of a batch are on the device.

    Attributes:
        axes: what they are multiplied by; None leaves them as they are.
    """

    axes: Tensor | None = None

    def __init__(self, shards: Sequence[Tensor], device: str) -> None:
        self._shards, self._device = shards, device

    def rows(self, rows: Sequence[int]) -> Tensor:
        """Return those of sequences given by their numbers, in float32."""
        found = torch.stack([self._row(row) for row in rows])
        found = found.to(self._device, torch.float32)
        return found if self.axes is None else found @ self.axes

    def _row(self, row: int) -> Tensor:
        for shard in self._shards:
            if row < len(shard):
                return shard[row]
            row -= len(shard)
        raise IndexError(row)


class _Compressed:
    """A layer as it was compressed, in float32, in the class that users run.

    Attributes:
        module: itself.
        prefix: of the names of its tensors.
        shared: names, below the layer, of those that it takes from another or another from it.
    """

    def __init__(
        self, record: Record, job: CompressionJob, run: Directory, device: str, *, index: int
    ) -> None:
        family = load_family(job.shape.family)
        self.prefix = family.layer.format(i=index) + "."
        shrunk = Checkpoint(run.below(SHRUNK.rstrip("/")))
        config = shrunk.config
        self._outer = OuterModel(config, family, dtype=torch.float32, device=device)
        files = (read_tensors(run, file.path) for file in record.files)
        tensors = {name.removeprefix(self.prefix): t for each in files for name, t in each.items()}
        taken = {name: stored for name, stored in shrunk.shared.items() if self._has(name)}
        tensors |= {self._below(name): shrunk.read(stored) for name, stored in taken.items()}
        given = [stored for stored in shrunk.shared.values() if self._has(stored)]
        self.shared = frozenset(map(self._below, [*taken, *given]))
        self.module, self._index = self._outer.layer(index, tensors), index
        # Weights stay in float32; matrices are multiplied in the dtype of the pass.
        products = getattr(torch, job.batching.dtype)
        self._multiplying = partial(
            torch.autocast, device, dtype=products, enabled=products != torch.float32
        )

    def _has(self, name: str) -> bool:
        return name.startswith(self.prefix)

    def _below(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the output of the layer, (sequences, tokens, width)."""
        arguments = self._outer.layer_arguments(hidden)[self._index]
        with self._multiplying():
            output: Tensor = self.module(hidden, **arguments)
        return output


def export(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write files of the trained model: those of the compressed one, with what was trained."""
    del job, reads
    first, *training = (read_record(run, name) for name in task.inputs)
    if not training:
        return _copied(first, TRAINED, run)
    (file,) = training[0].files
    _require_intact(run.uri, file)
    return _exported(first, StoredTensors(run, file.path), run)


@lru_cache(maxsize=1)
def _require_intact(run_uri: str, file: FileEntry) -> None:
    """Refuse a file that is not as it was written; as it has all layers, it is read once for all.

    Raises:
        StorageError: it does not match its hash.
    """
    run = Directory(run_uri)
    if run.sha256(file.path) != file.sha256:
        raise damaged(run, file)


def keep(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Copy files into the result: those of the trained model where its held-out loss is lower."""
    del job, reads
    shrunk, trained, choice = (read_record(run, name) for name in task.inputs)
    files, values = _copied(trained if choice.values["used"] else shrunk, "model/", run)
    found = {key: value for key, value in trained.values.items() if key != "tensors"}
    return files, {**shrunk.values, **found, **values}


def _hidden(run: Directory, unit: str) -> Tensor:
    (file,) = read_record(run, unit).files
    return map_tensors(run, file)[HIDDEN]


def _copied(record: Record, folder: str, run: Directory) -> Done:
    """Copy the files of a unit into another folder; return them with the tensors that they hold."""
    files = tuple(_copy(run, file, folder) for file in record.files)
    return files, {"tensors": _tensors_of(record)}


def _copy(run: Directory, file: FileEntry, folder: str) -> FileEntry:
    name = folder + file.path.partition("/")[2]
    with run.writing(name) as stream:
        for start in range(0, file.bytes, COPY_BYTES):
            size = min(COPY_BYTES, file.bytes - start)
            stream.write(memoryview(run.read_range(file.path, start, size)))
    copied = stream.entry(name)
    if copied.sha256 != file.sha256:
        raise damaged(run, file)
    return copied


def _exported(record: Record, trained: Mapping[str, Tensor], run: Directory) -> Done:
    """Write the files of a unit with other values of the tensors that were trained."""
    files, facts = [], dict(_tensors_of(record))
    for file in record.files:
        names = set(read_header(run, file.path))
        if not names & trained.keys():
            files.append(_copy(run, file, TRAINED))
            continue
        found = read_tensors(run, file.path)
        new = {name: _like(tensor, trained.get(name)) for name, tensor in found.items()}
        entry, own = write_weights(run, TRAINED + file.path.partition("/")[2], new)
        files.append(entry)
        facts |= own
    return tuple(files), {"tensors": facts}


def _like(stored: Tensor, trained: Tensor | None) -> Tensor:
    """Return the trained values in the dtype in which a tensor is stored; itself if untrained."""
    if trained is None:
        return stored
    new = trained.to(stored.dtype)
    require_finite(new)
    return new


def _tensors_of(record: Record) -> Mapping[str, object]:
    tensors = record.values.get("tensors", {})
    assert isinstance(tensors, Mapping)  # written by our own units
    return tensors
