"""The frozen data that cross a process border, and how activations are packed for it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.devices.transfer import to_device, to_host
from actors.storage.files import FileEntry
from planners.batching import TokenBatching
from planners.method import Option
from planners.model.form import ModelForm
from planners.model.scheme import Scheme
from planners.model.serving_load import ServingLoad
from planners.model.shape import ModelShape
from planners.model.taps import Statistic
from planners.recovery import Recovery
from planners.timing import MOST_ROUNDS, RUN_SECONDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A tensor as a numpy buffer: Ray maps numpy without a copy, torch tensors it pickles.

    Attributes:
        shape: of the tensor.
        dtype: torch's name, e.g. ``bfloat16``, which numpy has not.
        buffer: its bytes, uint8.
    """

    shape: tuple[int, ...]
    dtype: str
    buffer: np.ndarray


def pack(tensor: Tensor) -> Packed:
    """Return a tensor of at least one dimension as bytes."""
    flat = to_host(tensor).contiguous().reshape(-1)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Packed(shape=tuple(tensor.shape), dtype=dtype, buffer=flat.view(torch.uint8).numpy())


def unpack(packed: Packed, *, device: str) -> Tensor:
    """Return the tensor on a device, in memory of its own: the buffer may be read-only."""
    flat = torch.frombuffer(bytearray(packed.buffer), dtype=torch.uint8)
    return to_device(flat.view(getattr(torch, packed.dtype)).reshape(packed.shape), device)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Who a worker is and what it may use.

    Attributes:
        name: of its slot, e.g. ``worker-0``.
        incarnation: unique to this process.
        threads: threads of one unit.
        device: ``cpu`` or ``cuda``.
    """

    name: str
    incarnation: str
    threads: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """The layers of a checkpoint that a stage holds.

    Attributes:
        run_uri: the run directory: tokens, boundaries and statistics.
        checkpoint_uri: a model directory, dense or compressed.
        model_store: a directory that links in it may lead into, or empty.
        family: names its tensors.
        first: first layer.
        last: one past the last layer.
        embedding: it looks tokens up.
        head: it computes losses.
        statistics: what it accumulates while it observes.
        dtype: compute dtype.
        statistics_dtype: of the grams as they are stored.
        contents: of the checkpoint, as the worker must find them (`actors.storage.contents`).
    """

    run_uri: str
    checkpoint_uri: str
    family: str
    first: int
    last: int
    embedding: bool
    head: bool
    statistics: frozenset[Statistic]
    dtype: str
    statistics_dtype: str = "float64"
    contents: Mapping[str, str] = field(default_factory=dict)
    model_store: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialSums:
    """The sums of one layer over the first microbatches of a pass, in a file.

    Attributes:
        layer: its index.
        next: how many microbatches are in the sums: the first that is not.
        file: where they are.
    """

    layer: int
    next: int
    file: FileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeSums:
    """Which layers of an assignment sum, and from where.

    Attributes:
        layers: those that sum; the others pass microbatches on.
        partials: sums to resume from; a layer without one begins at the first microbatch.
    """

    layers: frozenset[int]
    partials: tuple[PartialSums, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone:
    """What a stage says after it has loaded.

    Attributes:
        seconds: it took.
        next: the first microbatch that one of its layers has not summed.
    """

    seconds: float
    next: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveDone:
    """What a stage says after it has written its partial sums."""

    incarnation: str
    partials: tuple[PartialSums, ...]
    started: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """Some sequences on their way through a stage.

    Attributes:
        index: position in the pass; a stage sees them in this order.
        tokens: file in the run directory that holds the token ids.
        rows: first sequence, one past the last.
        observe: add to the statistics.
        loss: the last stage computes the loss.
        hand_over: return the output to the next stage.
        read_boundary: file to read the input from where none is handed over; else empty.
        write_boundary: file to leave the output in; else empty.
    """

    index: int
    tokens: str
    rows: tuple[int, int]
    observe: bool = False
    loss: bool = False
    hand_over: bool = False
    read_boundary: str = ""
    write_boundary: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """What a stage says after one microbatch."""

    index: int
    incarnation: str
    num_tokens: int
    started: float
    seconds: float
    peak_bytes: int
    nats: float = 0.0
    num_predicted: int = 0
    boundary: FileEntry | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the last stage draws the next tokens, at temperature 1.

    Attributes:
        seed: with the number of a sequence and a position it determines a random number.
        sequences: the number of the first sequence, one past the last.
    """

    seed: int
    sequences: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateDone:
    """What a stage says after tokens have passed that it keeps the keys and values of.

    Attributes:
        held_bytes: its weights, and the most that generating took beside them.
    """

    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionJob:
    """What all compression units of a run share.

    Attributes:
        run_uri: the run directory, where units read and write.
        checkpoint_uri: the input model.
        sums: layer -> the directories and files of its statistics, those of another run first.
        model_store: a directory that links in it may lead into, or empty.
        method: a file of ``actors/methods``.
        options: of the method, complete.
        layer_options: layer -> those that it has for itself.
        shape: of the input model.
        form: widths of the result; not final while damage is measured.
        tokens: the file in the run directory that holds the calibration tokens, for units that
            stream them.
        batching: of these tokens.
        former: the step before, where its statistics are rotated into those of this one.
        makers: of each layer, module -> the method that shrinks it, where methods are mixed.
        candidates: method -> its options, of those beside the one that is named.
        statistics_dtype: of grams as they are stored.
        pair_order: rope pairs, the most important of the whole model first, for cuts to pairs that
            all heads keep.
        load: that the result is made for, where the times of layers are measured.
        contents: of the checkpoint, as the worker must find them (`actors.storage.contents`).
        in_flight_bytes: what a worker may hold for the units before and after the one it computes:
            results that are being written, and inputs that are read ahead; 0 if it has no room.
        folder: of the files that make a checkpoint, in the run directory.
        recovery: how the compressed model is trained, where it is.
        save_steps: steps between two checkpoints of a layer's training.
    """

    run_uri: str
    checkpoint_uri: str
    method: str
    options: Mapping[str, Option]
    shape: ModelShape
    form: ModelForm
    tokens: str
    batching: TokenBatching
    sums: Mapping[int, tuple[tuple[str, FileEntry], ...]] = field(default_factory=dict)
    former: "CompressionJob | None" = None
    layer_options: Mapping[int, Mapping[str, Option]] = field(default_factory=dict)
    makers: tuple[Mapping[str, str], ...] = ()
    candidates: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)
    pair_order: tuple[int, ...] = ()
    load: ServingLoad | None = None
    statistics_dtype: str = "float64"
    contents: Mapping[str, str] = field(default_factory=dict)
    model_store: str = ""
    in_flight_bytes: int = 0
    folder: str = "model/"
    recovery: Recovery | None = None
    save_steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTask:
    """One unit to do.

    Attributes:
        unit: its name, which names its files.
        kind: which function does it.
        index: layer or site, or -1.
        inputs: names of the units it reads, in the order the function expects.
        suffix: of the file's name, where statistics are added to those that are there.
    """

    unit: str
    kind: str
    index: int
    inputs: tuple[str, ...]
    suffix: str = ""


Done = tuple[tuple[FileEntry, ...], dict[str, object]]  # the files of a unit, and its values


@dataclass(frozen=True, slots=True, kw_only=True)
class Unwritten:
    """A unit that has computed and has its result in memory.

    Attributes:
        held: bytes of the result.
        write: writes its files; may be called in another thread.
    """

    held: int
    write: Callable[[], Done]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitDone:
    """What a worker says after a unit: the driver turns it into the record."""

    unit: str
    worker: str
    incarnation: str
    device: str
    files: tuple[FileEntry, ...]
    values: Mapping[str, object] = field(default_factory=dict)
    started: float
    seconds: float
    peak_bytes: int = 0

    @property
    def written_bytes(self) -> int:
        """Of all files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """A result to be loaded and compared with what was computed.

    Attributes:
        uri: its directory.
        family: names its tensors.
        tensors: name -> sha256, shape and dtype as they were computed.
        ids: sequences of equal length to run it on.
        whole: it fits one process; else it is read a tensor at a time.
        schemes: module -> how its matrix is quantised; None where only the config says it.
        model_store: a directory that links in its directory may lead into, or empty.
    """

    uri: str
    family: str
    tensors: Mapping[str, Mapping[str, Any]]
    ids: Sequence[Sequence[int]]
    whole: bool
    schemes: Mapping[str, Scheme] | None = None
    model_store: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRequest:
    """Models to be timed in turn, so that they share whatever else the machine does.

    Attributes:
        uris: name -> checkpoint directory; ratios are to the first one.
        prompt: tokens of each prompt.
        batches: prompts at one time; each is a setting, in this order.
        new_tokens: tokens generated for each prompt.
        recorded: the batches that are also decoded by a CUDA graph over a cache of a fixed size.
        compiled: likewise by `torch.compile`.
        max_rounds: of each setting; fewer where the ratios are steady before.
        seconds: after which a setting gets no more rounds than it needs at least.
        patience: a batch after the first is left out if its first rounds would take longer.
        model_store: a directory that links in their directories may lead into, or empty.
    """

    uris: Mapping[str, str]
    prompt: int
    batches: Sequence[int]
    new_tokens: int
    recorded: Sequence[int] = ()
    compiled: Sequence[int] = ()
    max_rounds: int = MOST_ROUNDS
    seconds: float = RUN_SECONDS
    patience: float = math.inf
    model_store: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRequest:
    """A compressed model that a group of workers trains against the model it was made from.

    Attributes:
        unit: its name; its checkpoints are named so.
        fingerprint: of the unit; checkpoints of another one are ignored.
        run_uri: the run directory.
        student_uri: the compressed model, a checkpoint.
        checkpoint_uri: the teacher, whose logits it learns.
        recovery: how it is trained.
        tokens: the file in the run directory that holds the training tokens, those that are held
            out at the end.
        dtype: of the products; weights, their moments and the loss are in float32.
        threads: of each worker.
        device: ``cpu`` or ``cuda``.
        save_every: steps between two checkpoints.
        stop: a file in the run directory; once it exists, the group saves a checkpoint and ends.
        contents: of the teacher, as workers must find them (`actors.storage.contents`).
        model_store: a directory that its links may lead into, or empty.
        input_uri: the model that was compressed, if that is not the teacher.
        divided: the layers of both models are divided over the workers, if there are several.
    """

    unit: str
    fingerprint: str
    run_uri: str
    student_uri: str
    checkpoint_uri: str
    recovery: Recovery
    tokens: str
    dtype: str
    threads: int
    device: str
    save_every: int
    stop: str
    contents: Mapping[str, str] = field(default_factory=dict)
    model_store: str = ""
    input_uri: str = ""
    divided: bool = False
