"""The worker that holds one stage, a contiguous run of layers, on one device."""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from actors.devices.memory import PeakMemory, release_freed_memory
from actors.devices.transfer import readers
from actors.layer_units.reads import Reads
from actors.layer_units.registry import compute_unit
from actors.messages import (
    Assignment,
    CompressionJob,
    Done,
    GenerateDone,
    LoadDone,
    Microbatch,
    Packed,
    PartialSums,
    ResumeSums,
    Sampling,
    SaveDone,
    StepDone,
    UnitDone,
    UnitTask,
    Unwritten,
    WorkerSetup,
    pack,
    unpack,
)
from actors.modeling.outer_model import OuterModel
from actors.numerics.sampling import drawn
from actors.statistics.observe import ForwardDoneError, LayerStatistics
from actors.statistics.sums import write_sums
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors, write_tensors
from actors.storage.tokens import tokens_from_parquet
from actors.storage.write_behind import WRITERS, WriteBehind
from planners.errors import ModelError, StorageError
from planners.families import load as load_family
from planners.memory.peaks import HOST_IN_FLIGHT
from planners.model.taps import layer_statistics

PARTIAL = "partial"  # the folder of partial sums in a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """The state of a stage while sequences are generated.

    Attributes:
        cache: keys and values of its layers, indexed by their numbers in the model.
        peak: memory since the first prompt.
        weight_bytes: size of its weights.
    """

    peak: PeakMemory
    weight_bytes: int
    cache: DynamicCache = field(default_factory=DynamicCache)


class _Clock:
    """When something began, and how long ago that is."""

    def __init__(self) -> None:
        self.started, self._begun = time.time(), time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun


class Stage:
    """Holds layers, passes microbatches through them, and executes units of work.

    A plain class; the executor turns it into a Ray actor.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        """Set threads and device; no layer is loaded yet."""
        torch.set_num_threads(setup.threads)
        if setup.device == "cuda":
            torch.empty(1, device="cuda")  # its context takes seconds: while the driver prepares
        self._setup = setup
        self._peak = PeakMemory(setup.device)
        self._layers: dict[int, nn.Module] = {}
        self._outer: OuterModel | None = None
        self._held: Assignment | None = None  # what is loaded, where another pass may use it as is
        self._statistics: dict[int, LayerStatistics] = {}
        self._tokens: dict[str, Tensor] = {}
        self._next: dict[int, int] = {}  # layer -> first microbatch not yet in its sums
        self._saved: dict[int, int] = {}  # layer -> the same for its newest partial sums
        self._generated: Generated | None = None
        self._reads = Reads(setup.device)
        # A core hashes half as fast as a disk writes.
        self._writes: WriteBehind[UnitDone] = WriteBehind(
            writers=max(WRITERS, readers(setup.device))
        )

    def __repr__(self) -> str:
        """Return the name shown in Ray's dashboard and log prefixes."""
        layers = f" layers {min(self._layers)}-{max(self._layers)}" if self._layers else ""
        return f"{self._setup.name}{layers}"

    def load(self, assignment: Assignment, summing: ResumeSums | None = None) -> LoadDone:
        """Load the layers of an assignment, dropping those loaded before.

        Args:
            assignment: the layers.
            summing: which of them accumulate statistics, and from which microbatch on; by default
                all, from the first.

        Raises:
            ModelError: a tensor is missing, broken or not finite.
        """
        started = time.monotonic()
        if assignment == self._held:  # by the pass before, of the same contents
            return LoadDone(seconds=time.monotonic() - started, next=0)
        self.drop()
        self._reads.forget()
        device = self._setup.device
        checkpoint = Checkpoint.of(assignment, device=device)
        self._assignment = assignment
        self._run = Directory(assignment.run_uri)
        self._tokens = {}
        family, dtype = load_family(assignment.family), getattr(torch, assignment.dtype)
        outer = OuterModel(checkpoint.config, family, dtype=dtype, device=device)
        self._outer = outer
        prefixes = {
            family.layer.format(i=index) + ".": index
            for index in range(assignment.first, assignment.last)
        }
        for prefix, tensors in checkpoint.stream_prefixes(prefixes):
            index = prefixes[prefix]
            self._layers[index] = outer.layer(index, tensors)
            if assignment.statistics and (summing is None or index in summing.layers):
                wanted = layer_statistics(checkpoint.shape, assignment.statistics, index)
                form = checkpoint.form.layers[index]
                self._statistics[index] = LayerStatistics(
                    wanted, checkpoint.shape, family, device=device, form=form
                )
                self._next[index] = 0
        for partial in summing.partials if summing is not None else ():
            self._resume_sums(partial)
        if assignment.embedding:
            outer.read_embedding(checkpoint)
        if assignment.head:
            outer.read_head(checkpoint)
        release_freed_memory()
        if assignment.contents and not assignment.statistics:
            self._held = assignment
        seconds = time.monotonic() - started
        return LoadDone(seconds=seconds, next=min(self._next.values(), default=0))

    def drop(self) -> None:
        """Drop layers and statistics."""
        self._layers, self._statistics = {}, {}
        self._outer = self._held = None
        self._next, self._saved = {}, {}
        self._generated = None
        release_freed_memory()

    @torch.inference_mode()
    def step(self, microbatch: Microbatch, packed: Packed | None) -> tuple[StepDone, Packed | None]:
        """Pass one microbatch through the layers; return a summary of the step and the output.

        A layer adds microbatches to its sums in order, each once. One that was already added only
        passes through, so a repeated call changes nothing.
        """
        started = time.time()
        begun = time.monotonic()
        hidden = self._input(microbatch, packed)
        due = {i for i, index in self._next.items() if index == microbatch.index}
        wanted = microbatch.hand_over or microbatch.loss or microbatch.write_boundary
        hidden = self._through(
            hidden, observed=due if microbatch.observe else set(), ends=not wanted
        )
        nats, num_predicted = 0.0, 0
        if microbatch.loss and self._assignment.head:
            nats, num_predicted = self._loaded.loss(hidden, self._ids(microbatch))
        boundary = None
        if microbatch.write_boundary:
            boundary = write_tensors(self._run, microbatch.write_boundary, {"hidden": hidden})
        done = StepDone(
            index=microbatch.index,
            incarnation=self._setup.incarnation,
            num_tokens=hidden.shape[0] * hidden.shape[1],
            started=started,
            seconds=time.monotonic() - begun,
            peak_bytes=self._peak.bytes(),
            nats=nats,
            num_predicted=num_predicted,
            boundary=boundary,
        )
        return done, pack(hidden) if microbatch.hand_over else None

    @torch.inference_mode()
    def generate(
        self, packed: Packed, start: int, sampling: Sampling | None = None
    ) -> tuple[GenerateDone, Packed]:
        """Pass the next tokens of some sequences, whose keys and values so far are cached here.

        Args:
            packed: output of the previous stage; token ids, (batch, tokens), for the first stage.
            start: position of the first token; 0 begins new sequences.
            sampling: how the next ids are drawn; the most likely ones are taken if it is not given.

        Returns:
            The input of the next stage; from the last stage the next ids, (batch, 1).

        Raises:
            NumericsError: ids are to be drawn from logits that are not finite.
        """
        outer = self._loaded
        if start == 0:
            self._generated = Generated(
                peak=PeakMemory(self._setup.device), weight_bytes=self._weight_bytes()
            )
        generated = self._generated
        assert generated is not None  # a prompt comes first
        hidden = unpack(packed, device=self._setup.device)
        if self._assignment.embedding:
            hidden = outer.embed(hidden, start=start)
        arguments = outer.layer_arguments(hidden, start=start, cache=generated.cache)
        for index, layer in self._layers.items():
            hidden = layer(hidden, **arguments[index])
        if self._assignment.head:
            position = start + hidden.shape[1]
            logits = outer.logits(hidden[:, -1:])
            hidden = logits.argmax(-1) if sampling is None else _draw(logits, sampling, position)
        handed_on = pack(hidden)
        return GenerateDone(held_bytes=generated.weight_bytes + generated.peak.bytes()), handed_on

    @property
    def _loaded(self) -> OuterModel:
        assert self._outer is not None  # a pass loads its layers first
        return self._outer

    def _weight_bytes(self) -> int:
        layers = self._layers.values()
        tensors = self._loaded.tensors() + [t for layer in layers for t in layer.parameters()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self) -> SaveDone:
        """Write the partial sums of the layers whose sums changed since they were last written.

        The incarnation is in the names, so a worker that was given up cannot overwrite the files of
        its replacement.
        """
        started, begun = time.time(), time.monotonic()
        partials = []
        for index, following in self._next.items():
            if following == self._saved.get(index, 0):
                continue
            where = f"layer-{index:05d}-mb-{following:05d}-{self._setup.incarnation}"
            tensors = self._statistics[index].tensors()
            entry = write_tensors(self._run, f"{PARTIAL}/{where}.safetensors", tensors)
            partials.append(PartialSums(layer=index, next=following, file=entry))
            self._saved[index] = following
        return SaveDone(
            incarnation=self._setup.incarnation,
            partials=tuple(partials),
            started=started,
            seconds=time.monotonic() - begun,
            peak_bytes=self._peak.bytes(),
        )

    @torch.inference_mode()
    def publish(self, task: UnitTask) -> None:
        """Begin to write the statistics of one layer, or those of a shard; ask `written` for them.

        On a device they are copied to the host first, while those of layers before are written.
        """
        clock = _Clock()
        layer, run = self._statistics[task.index], self._run
        dtype = self._assignment.statistics_dtype
        tensors, values = layer.tensors(), layer.summary()

        def write() -> Done:
            return (write_sums(run, task, tensors, dtype=dtype),), values

        # On a CPU the sums are written from where they are.
        copied = self._setup.device != "cpu"
        held = sum(tensor.nbytes for tensor in tensors.values()) if copied else 0
        self._write(task, Unwritten(held=held, write=write), most=HOST_IN_FLIGHT, clock=clock)

    @torch.inference_mode()
    def work(self, task: UnitTask, job: CompressionJob, ahead: UnitTask | None = None) -> None:
        """Do one unit of compression up to the writing of its files; ask `written` for them.

        Loaded layers are dropped first, as a factorisation needs the memory of the device. A later
        pass loads its layers again.

        Args:
            task: the unit.
            job: of the run.
            ahead: the unit that will probably follow, whose files are read meanwhile.

        Raises:
            NumericsError: the statistics gave no usable numbers.
            ModelError: a weight is missing or not finite.
        """
        clock = _Clock()
        if self._layers:
            self.drop()
        release_freed_memory()  # of the previous unit
        self._reads.begin(task, ahead, job)
        found = compute_unit(task, job, run=Directory(job.run_uri), reads=self._reads)
        self._write(task, found, most=job.in_flight_bytes // 2, clock=clock)

    def _write(self, task: UnitTask, found: Unwritten, *, most: int, clock: "_Clock") -> None:
        """Begin to write the files of a unit whose computation ends now."""
        computing = clock.seconds

        @torch.inference_mode()
        def write() -> UnitDone:
            writing = _Clock()
            files, values = found.write()
            return UnitDone(
                unit=task.unit,
                worker=self._setup.name,
                incarnation=self._setup.incarnation,
                device=self._setup.device,
                files=files,
                values=values,
                started=clock.started,
                seconds=computing + writing.seconds,
                peak_bytes=self._peak.bytes(),
            )

        self._writes.begin(task.unit, write, held=found.held, most=most)

    def written(self, unit: str) -> UnitDone:
        """Return what the record of a unit says, once its files are durable.

        Raises:
            StorageError: a file cannot be written.
        """
        return self._writes.result(unit)

    def _resume_sums(self, partial: PartialSums) -> None:
        """Restore the sums of a layer from a file; a missing or changed file leaves them empty."""
        try:
            if self._run.sha256(partial.file.path) != partial.file.sha256:
                return
            tensors = read_tensors(self._run, partial.file.path)
        except (StorageError, ModelError):
            return
        self._statistics[partial.layer].restore(tensors)
        self._next[partial.layer] = self._saved[partial.layer] = partial.next

    def _input(self, microbatch: Microbatch, packed: Packed | None) -> Tensor:
        device = self._setup.device
        if self._assignment.embedding:
            return self._loaded.embed(self._ids(microbatch))
        if packed is not None:
            return unpack(packed, device=device)
        return read_tensors(self._run, microbatch.read_boundary)["hidden"].to(device)

    def _ids(self, microbatch: Microbatch) -> Tensor:
        if microbatch.tokens not in self._tokens:
            array = tokens_from_parquet(self._run.read(microbatch.tokens))
            self._tokens[microbatch.tokens] = torch.from_numpy(array)
        return self._tokens[microbatch.tokens][slice(*microbatch.rows)]

    def _through(self, hidden: Tensor, *, observed: set[int], ends: bool) -> Tensor:
        """Return the output of the last layer; its input if ``ends``: nobody needs the output."""
        arguments = self._loaded.layer_arguments(hidden)
        for index, layer in self._layers.items():
            sums = self._statistics[index] if index in observed else None
            last = ends and index == self._assignment.last - 1
            if last and sums is None:
                break
            if sums is not None:
                sums.attach(layer, ends=last)
            try:
                after = layer(hidden, **arguments[index])
            except ForwardDoneError:
                after = None
            if sums is not None:
                sums.detach()
                sums.update_residual(hidden, after)
                self._next[index] += 1
            hidden = hidden if after is None else after
        return hidden


def _draw(logits: Tensor, sampling: Sampling, position: int) -> Tensor:
    """Return the ids at a position, (batch, 1), given the logits of one token a sequence."""
    numbers = range(*sampling.sequences)
    return drawn(logits[:, 0], seed=sampling.seed, sequences=numbers, position=position)[:, None]
