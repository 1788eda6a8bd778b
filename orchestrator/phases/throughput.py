"""Measure generation: all models in one process where they fit, else one by one through stages.

Whether they fit is computed from the plan's formulas. Stages use the fewest workers that hold the
model; each keeps the keys and values of its layers, and the driver receives nothing but token ids.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from actors.messages import Packed, ThroughputRequest, UnitDone, WorkerSetup
from actors.storage.checkpoint import Checkpoint
from orchestrator.engine.failure_policy import FAILURES, Action, Place
from orchestrator.engine.fresh_process import EvaluatorProcess
from orchestrator.engine.supervisor import Call
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.calibrate import assignments
from orchestrator.phases.context import RunContext
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.prepare.machine import GIB
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.memory.generation import (
    fewest_stages,
    generation_load,
    largest_batch,
    whole_bytes,
)
from planners.memory.placement import Load
from planners.model.speed_facts import speed_facts
from planners.plan import StagePlan
from planners.timing import (
    BATCHES,
    EAGER,
    NEW_TOKENS,
    PATIENCE_SECONDS,
    PROMPT_TOKENS,
    RUN_MOST,
    RUN_SECONDS,
    finished,
    speeds,
)
from planners.units.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """The workers available for timing a model.

    Attributes:
        number: of them, at most.
        bytes: memory of each.
    """

    number: int
    bytes: int


def throughput(
    context: RunContext, subjects: list[Subject], process: EvaluatorProcess
) -> Mapping[str, Any]:
    """Return name -> what `measure` returns for the input model and the result."""
    key = {"schema": SCHEMA_VERSION, "kind": "throughput", "of": [s.identity for s in subjects]}
    unit = Unit(name="throughput", kind="throughput", index=-1, inputs=(),
                fingerprint=fingerprint(key))  # fmt: skip
    if not context.ledger.todo([unit]):
        return context.ledger.record(unit).values
    config = context.prepared.config
    longest = int(context.prepared.model_config.get("max_position_embeddings", 2048))
    request = ThroughputRequest(
        uris={s.name: s.uri for s in subjects},
        prompt=max(1, min(PROMPT_TOKENS[config.device], longest - NEW_TOKENS[config.device])),
        batches=BATCHES,
        new_tokens=NEW_TOKENS[config.device],
        seconds=RUN_SECONDS,
        patience=PATIENCE_SECONDS,
        model_store=config.model_store,
    )
    of_load: set[int] = set()
    if config.speedup is not None:  # what was promised is measured too
        load = config.load
        of_load = {load.batch}
        prompt = max(1, min(load.context, longest - request.new_tokens))
        request = replace(request, prompt=prompt, batches=[load.batch])
    workers = Workers(number=config.workers, bytes=int((config.worker_gib or 0) * GIB))
    on_gpu = config.device == "cuda"
    largest = batch_that_fits(request, workers, most=RUN_MOST[config.device])
    if largest:
        batches = of_load or {min(batch, largest) for batch in BATCHES}
        request = replace(
            request,
            batches=sorted(batches | ({largest} if on_gpu else set())),
            # Not by torch.compile, which takes many seconds, or minutes where layers are many.
            recorded=[min(max(BATCHES), largest)] if on_gpu else (),
        )

    def pool_of(number: int) -> Pool:
        setup = WorkerSetup(
            name="pattern", incarnation="", threads=config.threads, device=config.device
        )
        pool = Pool(
            context.pool.executor,
            setup,
            num_workers=number,
            journal=context.journal,
            place_seconds=config.place_seconds,
        )
        pool.interruption = context.pool.interruption
        return pool

    with context.phase("throughput", total=1):
        if largest:
            done = context.answered(process, unit, "throughput", request)
        else:
            process.close()  # its cores and its memory are for the stages
            done = through_stages(request, workers, pool_of)
            context.journal.emit(
                unit.kind, unit=unit.name, worker=done.worker, start=done.started,
                seconds=done.seconds,
            )  # fmt: skip
        done = replace(done, values=with_facts(done.values, request, device=config.device))
        context.ledger.commit(unit, done, attempt=1)
    return done.values


def batch_that_fits(request: ThroughputRequest, workers: Workers, *, most: int) -> int:
    """Return the largest power of two of sequences for which one worker holds all models.

    0 if it cannot hold them; ``most`` limits it.
    """
    models = [Checkpoint(uri, model_store=request.model_store) for uri in request.uris.values()]
    return largest_batch(
        [(model.shape, model.form) for model in models],
        tokens=request.prompt + request.new_tokens,
        worker_bytes=workers.bytes,
        most=most,
    )


def with_facts(
    values: Mapping[str, Any], request: ThroughputRequest, *, device: str
) -> dict[str, Any]:
    """Return the measurements of each model with the main one, and what explains them.

    The main setting is the largest batch up to that of a run, eager: its speeds stand beside
    ``settings``, as ``prefill_tokens_per_second`` and ``decode_tokens_per_second``.
    """
    found = {}
    for name, uri in request.uris.items():
        model = Checkpoint(uri, model_store=request.model_store)
        facts = speed_facts(model.shape, model.form)
        sizes = {"prompt": request.prompt, "new_tokens": request.new_tokens, "device": device}
        found[name] = {**_main(values[name]["settings"]), **values[name], **sizes, "facts": facts}
    return found


def _main(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    eager = [row for row in settings if row["mode"] == EAGER]
    timed = [row for row in eager if "not_measured" not in row]
    if not timed:
        return {"not_measured": eager[0]["not_measured"]}
    usual = [row for row in timed if row["batch"] <= max(BATCHES)] or timed
    return {key: value for key, value in usual[-1].items() if key != "rounds"}


def through_stages(
    request: ThroughputRequest, workers: Workers, pool_of: Callable[[int], Pool]
) -> UnitDone:
    """Time the models one after the other, each on the fewest workers that hold it.

    The values of a model that does not fit all workers together say so. A batch that does not fit,
    though a smaller one does, is left out.

    Args:
        request: the models, and what they generate.
        workers: available ones.
        pool_of: number of workers -> a pool of that size.

    Raises:
        ClusterError: too many workers were lost.
        CompressionError: what a worker raised.
    """
    started, begun = time.time(), time.monotonic()
    values: dict[str, Any] = {}
    for name, uri in request.uris.items():
        model = Checkpoint(uri, model_store=request.model_store)
        chains = {batch: _stages(model, request, batch, workers) for batch in request.batches}
        fitting = [batch for batch in request.batches if chains[batch]]
        rows = [
            {
                "batch": batch,
                "mode": EAGER,
                "not_measured": _too_large(model, _load(model, request, batch), workers),
            }
            for batch in request.batches
            if batch not in fitting
        ]
        if fitting:
            stages = chains[max(fitting)]
            pool = pool_of(len(stages))
            try:
                chain = _Chain(pool, model, uri, stages, request)
                rows = [*(chain.measured(batch) for batch in fitting), *rows]
            finally:
                pool.close()
        values[name] = {"settings": rows}
    return UnitDone(
        unit="throughput",
        worker="stages",
        incarnation="",
        device="",
        files=(),
        values=values,
        started=started,
        seconds=time.monotonic() - begun,
    )


def _stages(
    model: Checkpoint, request: ThroughputRequest, batch: int, workers: Workers
) -> tuple[StagePlan, ...]:
    load = _load(model, request, batch)
    return fewest_stages(model.shape, load, num_workers=workers.number, worker_bytes=workers.bytes)


def _load(model: Checkpoint, request: ThroughputRequest, batch: int) -> Load:
    tokens = request.prompt + request.new_tokens
    return generation_load(model.shape, model.form, batch=batch, tokens=tokens)


def _too_large(model: Checkpoint, load: Load, workers: Workers) -> str:
    needed = whole_bytes(model.shape, load)
    count = f"{workers.number} workers" if workers.number > 1 else "1 worker"
    return (
        f"generation needs {needed:,} bytes in total; {count} of {workers.bytes:,} bytes cannot "
        "hold it"
    )


class _AgainError(Exception):
    """A call failed and its worker was replaced if needed: restart the measurement."""


class _Chain:
    """A model that generates across the slots of a pool, one stage in each."""

    def __init__(
        self,
        pool: Pool,
        model: Checkpoint,
        uri: str,
        stages: Sequence[StagePlan],
        request: ThroughputRequest,
    ) -> None:
        self._pool, self._request = pool, request
        self._vocabulary = model.shape.vocab_size
        self._held = [0] * len(stages)
        self._loaded = False
        self._assignments = assignments(
            stages,
            run_uri=uri,  # nothing is read from it but the checkpoint, and nothing written
            checkpoint_uri=uri,
            family=model.shape.family,
            dtype=model.shape.dtype,
            model_store=request.model_store,
        )

    def measured(self, batch: int) -> dict[str, Any]:
        """Return the speeds of a batch, after a first warm-up round that is dropped."""
        request = self._request
        sizes = (batch * request.prompt, batch * request.new_tokens)
        while True:
            try:
                self._load()
                self._round(batch)
                begun, rounds = time.monotonic(), [self._round(batch)]
                while not finished(
                    {"": rounds},
                    time.monotonic() - begun,
                    max_rounds=request.max_rounds,
                    max_seconds=request.seconds,
                ):
                    rounds.append(self._round(batch))
            except _AgainError:
                self._loaded = False
                continue
            return {
                "batch": batch,
                "mode": EAGER,
                **speeds(rounds, sizes),
                "peak_bytes": sum(self._held),
                "stages": len(self._assignments),
            }

    def _load(self) -> None:
        """Load the layers, unless the workers hold them."""
        if not self._loaded:
            loads = [
                (slot, self._pool.call(slot, "load", assignment, label="load"))
                for slot, assignment in enumerate(self._assignments)
            ]
            self._answers(loads)
            self._loaded = True

    def _round(self, batch: int) -> tuple[float, float]:
        """Return the seconds of prompts and new tokens, from the first call to the last token."""
        prompt = self._request.prompt
        ids = np.random.default_rng(0).integers(0, self._vocabulary, size=(batch, prompt))
        begun = time.perf_counter()
        packed = Packed(shape=ids.shape, dtype="int64", buffer=ids.reshape(-1).view(np.uint8))
        calls = self._through_stages(packed, 0)
        self._wait([calls[-1][1]])
        prefilled = time.perf_counter()
        self._collect(calls)
        begun_again, decoding = time.perf_counter(), []
        for number in range(self._request.new_tokens):
            # Submitted before the previous token has arrived: ids go from worker to worker.
            calls = self._through_stages(calls[-1][2], prompt + number)
            decoding += calls
        self._wait([decoding[-1][1]])
        decode_seconds = time.perf_counter() - begun_again
        self._collect(decoding)
        return prefilled - begun, decode_seconds

    def _through_stages(self, packed: Any, start: int) -> list[tuple[int, Any, Any]]:
        """Send tokens through all stages; return slot, ticket and output ticket of each call."""
        calls = []
        for slot in range(len(self._assignments)):
            done, packed = self._pool.call(
                slot, "generate", packed, start, num_returns=2, label=f"generate {start}"
            )
            calls.append((slot, done, packed))
        return calls

    def _collect(self, calls: Sequence[tuple[int, Any, Any]]) -> None:
        """Wait for calls, and note the memory that their workers hold."""
        answers = self._answers([(slot, done) for slot, done, _ in calls])
        for (slot, _, _), done in zip(calls, answers, strict=True):
            self._held[slot] = max(self._held[slot], done.held_bytes)

    def _answers(self, calls: Sequence[tuple[int, Any]]) -> list[Any]:
        """Return the answers, in order, once all have arrived.

        Raises:
            _AgainError: a call failed and may be retried.
        """
        self._wait([ticket for _, ticket in calls])
        return [self._answer(slot, ticket) for slot, ticket in calls]

    def _wait(self, waiting: Sequence[Any]) -> None:
        """Return when all have answered, or failed.

        Raises:
            KeyboardInterrupt: the user asked to stop.
        """
        while waiting:
            if self._pool.interruption.requested:
                raise KeyboardInterrupt  # only this measurement is lost
            answered = self._pool.ready(waiting, needed=range(len(self._assignments)))
            waiting = [ticket for ticket in waiting if ticket not in answered]

    def _answer(self, slot: int, ticket: Any) -> Any:
        try:
            return self._pool.executor.result(ticket)
        except FAILURES as error:
            name = self._pool.setup(slot).name
            call = Call(name="throughput", place=Place.NOWHERE_ELSE, worker=name)
            if self._pool.supervisor.handle(call, error) is Action.REPLACE:
                self._pool.replace(slot, error)
            raise _AgainError from error
