"""Checks of finished results: bytes against records, loading, speed."""

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from actors.messages import ThroughputRequest, VerifyRequest, WorkerSetup
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import Record, read_records, torn_records
from actors.storage.sources import resolve_store
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.fresh_process import FreshProcess, in_fresh_process
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.throughput import (
    Workers,
    batch_that_fits,
    through_stages,
    with_facts,
)
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import Event, Journal
from orchestrator.rundir.layout import HALF_WRITTEN, MAY_BE_GONE, READY, REPORT
from planners.errors import StorageError
from planners.timing import BATCHES, BENCH_MOST, BENCH_PATIENCE_SECONDS, BENCH_SECONDS

IDS = [[(7 * i + 3 * j) % 97 for j in range(32)] for i in range(2)]  # any tokens will do
REDO = "repeat the command that wrote it: only that unit is recomputed"


def verify(
    uri: str, *, model_store: str = "", threads: int = 1, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Return the checks of a run, or of a model directory that is not part of a run.

    Raises:
        StorageError: a file differs from its record; the message names it.
        ModelError: the model is broken.
    """
    run, tensors, store = Directory(uri), {}, resolve_store(model_store)
    model = model_of(run)
    checks: list[dict[str, Any]] = []
    if model != run.uri:
        checks.append(check_files(run))
        tensors = _tensors_of(read_records(run))
    checkpoint = Checkpoint(model, model_store=store)
    request = VerifyRequest(
        uri=model,
        family=checkpoint.shape.family,
        tensors=tensors or _stored(checkpoint),
        ids=[[i % checkpoint.shape.vocab_size for i in row] for row in IDS],
        whole=True,
        model_store=store,
    )
    with ray_cluster.connected("local", num_cpus=threads, num_gpus=0, store_bytes=0):
        fresh = FreshProcess(unit="verify", threads=threads, device=device)
        done = in_fresh_process(RayExecutor(), fresh, "verify", request)
    found = done.values["checks"]
    assert isinstance(found, list)  # written by our own evaluator
    return [*checks, *found]


def model_of(directory: Directory) -> str:
    """Return the model directory: that of a run, or the given one."""
    is_run = directory.size("plan.json") is not None
    return directory.below("model") if is_run else directory.uri


def bench(  # noqa: PLR0913 all that decides what is measured
    uris: Sequence[str],
    *,
    prompt: int,
    batches: Sequence[int],
    new_tokens: int,
    compiled: bool,
    setup: WorkerSetup,
    workers: Workers,
    model_store: str = "",
) -> dict[str, dict[str, Any]]:
    """Return model -> its speeds at every batch, as a run measures them.

    Batches for which all models fit one worker are timed in one process, the models in turn, so
    that other load on the machine affects all alike; for others each model is spread over as few
    workers as hold it, one model after the other.

    Args:
        uris: models, or runs; ratios are to the first.
        prompt: tokens.
        batches: prompts at one time; if empty 1, 16 and as many as fit, without those
            that would take minutes.
        new_tokens: after each prompt.
        compiled: whether batches in one process are also decoded by a compiled step.
        setup: of a worker.
        workers: available ones.
        model_store: a directory that links in the directories may lead into, or empty.
    """
    models, store = {uri: model_of(Directory(uri)) for uri in uris}, resolve_store(model_store)
    for model in models.values():
        Checkpoint(model, model_store=store)  # first validate every checkpoint
    request = ThroughputRequest(
        uris=models,
        prompt=prompt,
        batches=batches,
        new_tokens=new_tokens,
        seconds=BENCH_SECONDS,
        patience=math.inf if batches else BENCH_PATIENCE_SECONDS,
        model_store=store,
    )
    # A given batch is tried, however large.
    most = max(BENCH_MOST[setup.device], 2 * max(batches, default=1) - 1)
    largest = batch_that_fits(request, workers, most=most)
    wanted = sorted({*batches} or {*BATCHES, max(1, largest)})
    inside = [batch for batch in wanted if batch <= largest]
    outside = [batch for batch in wanted if batch > largest]
    found: dict[str, dict[str, Any]] = {uri: {"settings": []} for uri in uris}
    gpus = workers.number if setup.device == "cuda" else 0
    with (
        tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder,
        ray_cluster.connected(
            "local", num_cpus=workers.number * setup.threads, num_gpus=gpus, store_bytes=0
        ),
    ):
        executor = RayExecutor()
        journal = Journal(Directory(folder), _nobody)
        if inside:
            fresh = FreshProcess(unit="bench", threads=setup.threads, device=setup.device)
            own = replace(
                request,
                batches=inside,
                recorded=inside if setup.device == "cuda" else (),
                compiled=inside if compiled else (),
            )
            _add(found, in_fresh_process(executor, fresh, "throughput", own).values)
        if outside:
            own = replace(request, batches=outside)
            done = through_stages(
                own,
                workers,
                lambda number: Pool(executor, setup, num_workers=number, journal=journal),
            )
            _add(found, done.values)
    return with_facts(found, request, device=setup.device)


def _add(found: Mapping[str, dict[str, Any]], values: Mapping[str, Any]) -> None:
    for uri, own in values.items():
        settings = [*found[uri]["settings"], *own["settings"]]
        found[uri].update(own, settings=settings)


def _nobody(event: Event) -> None:
    del event  # a measurement has no listener


def check_files(run: Directory) -> dict[str, Any]:
    """Compare every byte with the records, and check that each file of the result has one.

    Raises:
        StorageError: a file differs, or has no record; the message names it.
    """
    records = read_records(run)
    torn = torn_records(run)
    if torn:
        raise StorageError(f"{run.path(torn[0])}: is damaged", hint=REDO)
    ready = run.size(READY) is not None
    checked = 0
    for record in records.values():
        for file in record.files:
            if ready and file.path.startswith(MAY_BE_GONE) and run.size(file.path) is None:
                continue
            if run.size(file.path) != file.bytes or run.sha256(file.path) != file.sha256:
                raise StorageError(
                    f"{run.path(file.path)}: differs from the record of {record.unit}", hint=REDO
                )
            checked += 1
    vouched = {file.path for record in records.values() for file in record.files}
    strange = [
        name
        for name in run.names("model")
        if name not in vouched and not name.endswith(HALF_WRITTEN)
    ]
    if strange:
        raise StorageError(f"{run.path(strange[0])}: no record lists it", hint=REDO)
    if ready and finished_report(run) is None:
        raise StorageError(
            f"{run.path(READY)}: does not belong to this result, or {REPORT} does not",
            hint=REDO,
        )
    return {"name": "every file as recorded", "passed": True, "detail": f"{checked} files"}


def _tensors_of(records: Mapping[str, Record]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for record in records.values():
        found = record.values.get("tensors", {})
        if isinstance(found, Mapping):
            tensors |= found
    return tensors


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tensors of the files, to compare with those of the loaded model."""
    from actors.storage.tensors import described  # torch: needed here only

    return {name: described(checkpoint.read_stored(name)) for name in checkpoint.locations}
