"""Looking at results from outside: is every byte as recorded, does it load, how fast is it."""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.messages import ThroughputRequest, VerifyRequest
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import Record, is_intact, read_records
from orchestrator import cluster
from orchestrator.evaluate import FreshProcess, in_fresh_process
from orchestrator.executors import RayExecutor
from planners.errors import StorageError

IDS = [[(7 * i + 3 * j) % 97 for j in range(32)] for i in range(2)]  # any tokens will do
DROPPED = ("stats/", "basis/", "boundary/", "refit/", "draft/")  # gone once a run is READY


def verify(uri: str, *, threads: int = 1, device: str = "cpu") -> list[dict[str, Any]]:
    """Return what was checked of a run, or of a model directory that no run of ours wrote.

    Raises:
        StorageError: a file differs from its record; the message names it.
        ModelError: the model is broken.
    """
    run, tensors = Directory(uri), {}
    model = uri
    checks: list[dict[str, Any]] = []
    if run.size("plan.json") is not None:
        records = read_records(run)
        checks.append(_files_as_recorded(run, records))
        tensors = _tensors_of(records)
        model = run.below("model")
    checkpoint = Checkpoint(model)
    request = VerifyRequest(
        uri=model,
        family=checkpoint.shape.family,
        tensors=tensors or _stored(checkpoint),
        ids=[[i % checkpoint.shape.vocab_size for i in row] for row in IDS],
        whole=True,
    )
    with cluster.connected("local", num_cpus=threads, num_gpus=0, store_bytes=0):
        fresh = FreshProcess(unit="verify", threads=threads, device=device)
        done = in_fresh_process(RayExecutor(), fresh, "verify", request)
    found = done.values["checks"]
    assert isinstance(found, list)  # written by our own evaluator
    return [*checks, *found]


def bench(
    uris: Sequence[str], *, prompt: int, batches: Sequence[int], new_tokens: int, threads: int
) -> list[dict[str, Any]]:
    """Return one row a model and batch size: prefill and decode tokens per second, peak bytes.

    The models of one batch size are measured in turn in one process, so that they share whatever
    else the machine does; medians of three rounds.
    """
    for uri in uris:
        Checkpoint(uri)  # at the door: every one of them is a sound checkpoint
    rows = []
    with cluster.connected("local", num_cpus=threads, num_gpus=0, store_bytes=0):
        for batch in batches:
            request = ThroughputRequest(
                uris={uri: uri for uri in uris},
                prompt=prompt,
                batch=batch,
                new_tokens=new_tokens,
                rounds=3,
            )
            fresh = FreshProcess(unit=f"bench-{batch}", threads=threads, device="cpu")
            done = in_fresh_process(RayExecutor(), fresh, "throughput", request)
            for uri, measured in done.values.items():
                assert isinstance(measured, Mapping)  # written by our own evaluator
                rows.append({"model": uri, "batch": batch, **measured})
    return rows


def _files_as_recorded(run: Directory, records: Mapping[str, Record]) -> dict[str, Any]:
    ready = run.size("READY") is not None
    checked = 0
    for record in records.values():
        dropped = ready and all(file.path.startswith(DROPPED) for file in record.files)
        if dropped and any(run.size(file.path) is None for file in record.files):
            continue
        if not is_intact(run, record, hashes=True):
            names = ", ".join(file.path for file in record.files)
            raise StorageError(
                f"{run.uri}: {names}: not as {record.unit} recorded it",
                hint="run the command that made it again: that unit alone is done again",
            )
        checked += len(record.files)
    return {"name": "every file as recorded", "passed": True, "detail": f"{checked} files"}


def _tensors_of(records: Mapping[str, Record]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for record in records.values():
        found = record.values.get("tensors", {})
        if isinstance(found, Mapping):
            tensors |= found
    return tensors


def _stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the files hold, to be compared with what a loaded model holds."""
    from actors.storage.tensors import described  # torch: needed here only

    return {name: described(checkpoint.read(name)) for name in checkpoint.locations}
