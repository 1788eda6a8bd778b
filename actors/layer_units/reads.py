"""What units read: now, or ahead while the unit before computes."""

import functools
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from actors import methods
from actors.devices.transfer import readers, to_device
from actors.messages import CompressionJob, UnitTask
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import map_tensors
from planners.units.kinds import KINDS, STATISTICS, kind_of, layer_of

# Kinds of which all that is named by their layer and their inputs is read by these methods.
READ_AHEAD = ("basis", "damage", "draft", "layer", "losses")
Tensors = dict[str, Tensor]
Named = Iterable[tuple[str, Tensor]]


class Reads:
    """Reads what units need; what was read ahead for a unit is taken by it.

    Attributes:
        device: that computes.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._threads = ThreadPoolExecutor(readers(device), thread_name_prefix="next-unit")
        self._now: dict[Hashable, Future[Tensors]] = {}
        self._ahead: dict[Hashable, Future[Tensors]] = {}
        self._expected = ""
        self._opened: Checkpoint | None = None
        self._opened_for: tuple[object, ...] = ()

    def begin(self, task: UnitTask, ahead: UnitTask | None, job: CompressionJob) -> None:
        """Begin a unit, and to read the files of the one that will probably follow, on the host.

        What was read ahead for another unit than this one is dropped. A failure to read ahead is
        not reported: that unit reads again, and fails with an error of its own.
        """
        self._now = self._ahead if task.unit == self._expected else {}
        self._ahead, self._expected = {}, ""
        if ahead is None or not job.in_flight_bytes or ahead.kind not in READ_AHEAD:
            return
        self._expected, index = ahead.unit, ahead.index
        if ahead.kind == "basis":
            if (gram := site_statistic(index, job)) is not None:
                read = functools.partial(read_statistics, job, gram[0])
                self._read_ahead(_sums(gram[0]), read)
            return
        if KINDS[ahead.kind].reads == "layer":
            stream = self.checkpoint(job).stream_layer
            self._read_ahead(_weights(index), lambda: dict(stream(index)))
        for name in ahead.inputs:
            found = kind_of(name)
            assert found is not None  # a unit of this run
            if found.leaves == STATISTICS and (layer := layer_of(name)) is not None:
                self._read_ahead(_sums(layer), functools.partial(read_statistics, job, layer))
            elif found.phase == "compress" and found.of != "layer":
                run = Directory(job.run_uri)
                self._read_ahead(name, functools.partial(_read_basis, name, run))

    def forget(self) -> None:
        """Drop what was read ahead."""
        self._now, self._ahead, self._expected = {}, {}, ""

    def checkpoint(self, job: CompressionJob) -> Checkpoint:
        """Return the model of a job; its headers are read once for all units."""
        key = (job.checkpoint_uri, job.model_store, job.contents)
        if self._opened is None or self._opened_for != key:
            self._opened, self._opened_for = Checkpoint.of(job, device=self.device), key
        return self._opened

    def weights(self, job: CompressionJob, layer: int) -> Tensors:
        """Return role -> tensor of one layer, on the device.

        Raises:
            ModelError: a weight is missing, not finite, or not the expected one.
        """
        read = functools.partial(self.checkpoint(job).stream_layer, layer)
        return self._on_device(_weights(layer), read)

    def statistics(self, job: CompressionJob, layer: int) -> Tensors:
        """Return the sums of one layer (see `read_statistics`), on the device."""
        return self._on_device(_sums(layer), lambda: read_statistics(job, layer).items())

    def statistic(self, job: CompressionJob, layer: int, name: str) -> Tensor:
        """Return one of the sums of a layer, on the device."""
        return to_device(self._read(_sums(layer), lambda: read_statistics(job, layer))[name],
                         self.device)  # fmt: skip

    def bases(self, names: tuple[str, ...], run: Directory) -> tuple[Tensor, ...]:
        """Return the bases that units wrote, on the device."""
        read = (self._read(name, functools.partial(_read_basis, name, run)) for name in names)
        return tuple(to_device(found["vectors"], self.device) for found in read)

    def _read_ahead(self, key: Hashable, read: Callable[[], Tensors]) -> None:
        self._ahead[key] = self._threads.submit(torch.inference_mode()(read))

    def _read(self, key: Hashable, read: Callable[[], Tensors]) -> Tensors:
        found = self._now.pop(key, None)
        return read() if found is None or found.exception() is not None else found.result()

    def _on_device(self, key: Hashable, read: Callable[[], Named]) -> Tensors:
        if key not in self._now:  # one after the other, so that not all are on the host
            return {name: to_device(tensor, self.device) for name, tensor in read()}
        found = self._read(key, lambda: dict(read()))
        return {name: to_device(found.pop(name), self.device) for name in list(found)}


def read_statistics(job: CompressionJob, layer: int) -> Tensors:
    """Return the sums of one layer: those of this run and of a run whose statistics it reuses.

    Grams are packed. Files on a local disk are mapped: they take no memory until a gram is unpacked
    to be factored.

    Raises:
        StorageError: a file is not as it was written.
    """
    found: Tensors = {}
    for uri, file in job.sums.get(layer, ()):
        found |= map_tensors(Directory(uri), file)
    return found


def site_statistic(site: int, job: CompressionJob) -> tuple[int, str] | None:
    """Return layer and name of the gram of a site, with the statistics of the layer that reads it.

    The last site, which the head reads, is with the last layer; None where the method does not
    observe it.
    """
    owner = min(site // 2, job.shape.num_layers - 1)
    tap = "resid_out" if site == 2 * job.shape.num_layers else ("resid_attn", "resid_mlp")[site % 2]
    wanted = {s.tap: s for s in methods.spec(job.method).statistics(job.shape, job.options)}
    return (owner, str(wanted[tap])) if tap in wanted else None


def _read_basis(name: str, run: Directory) -> Tensors:
    (file,) = read_record(run, name).files
    return map_tensors(run, file)


def _weights(layer: int) -> Hashable:
    return "weights", layer


def _sums(layer: int) -> Hashable:
    return "sums", layer
