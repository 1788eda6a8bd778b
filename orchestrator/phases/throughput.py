"""Measure generation: all models in one process where they fit, else one by one through stages.

Whether they fit is computed from the plan's formulas. Stages use the fewest workers that hold the
model; each keeps the keys and values of its layers, and the driver receives nothing but token ids.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from planners.memory.generation import fewest_stages, generation_load, whole_bytes
from planners.memory.placement import Load
from planners.plan import StagePlan
from planners.units.units import Unit

PROMPT_TOKENS, BATCH, NEW_TOKENS, ROUNDS = 128, 4, 32, 3


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
    """Return name -> prefill and decode tokens per second and peak bytes."""
    key = {"schema": SCHEMA_VERSION, "kind": "throughput", "of": [s.identity for s in subjects]}
    unit = Unit(name="throughput", kind="throughput", index=-1, inputs=(),
                fingerprint=fingerprint(key))  # fmt: skip
    if not context.ledger.todo([unit]):
        return context.ledger.record(unit).values
    config = context.prepared.config
    longest = int(context.prepared.model_config.get("max_position_embeddings", 2048))
    request = ThroughputRequest(
        uris={s.name: s.uri for s in subjects},
        prompt=max(1, min(PROMPT_TOKENS, longest - NEW_TOKENS)),
        batch=BATCH,
        new_tokens=NEW_TOKENS,
        rounds=ROUNDS,
        model_store=config.model_store,
    )
    workers = Workers(number=config.workers, bytes=int((config.worker_gib or 0) * GIB))

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
        if fits_one(request, workers):
            done = context.answered(process, unit, "throughput", request)
        else:
            process.close()  # its cores and its memory are for the stages
            done = through_stages(request, workers, pool_of)
            context.journal.emit(
                unit.kind, unit=unit.name, worker=done.worker, start=done.started,
                seconds=done.seconds,
            )  # fmt: skip
        context.ledger.commit(unit, done, attempt=1)
    return done.values


def fits_one(request: ThroughputRequest, workers: Workers) -> bool:
    """Return whether one worker can hold all the models at the same time."""
    models = [Checkpoint(uri, model_store=request.model_store) for uri in request.uris.values()]
    return sum(whole_bytes(m.shape, _load(m, request)) for m in models) <= workers.bytes


def through_stages(
    request: ThroughputRequest, workers: Workers, pool_of: Callable[[int], Pool]
) -> UnitDone:
    """Time the models one after the other, each on the fewest workers that hold it.

    The values of a model that does not fit all workers together say so.

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
        load = _load(model, request)
        stages = fewest_stages(
            model.shape, load, num_workers=workers.number, worker_bytes=workers.bytes
        )
        if not stages:
            values[name] = {"not_measured": _too_large(model, load, workers)}
            continue
        pool = pool_of(len(stages))
        try:
            values[name] = _Chain(pool, model, uri, stages, request).measured()
        finally:
            pool.close()
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


def _load(model: Checkpoint, request: ThroughputRequest) -> Load:
    tokens = request.prompt + request.new_tokens
    return generation_load(model.shape, model.form, batch=request.batch, tokens=tokens)


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
        self._assignments = assignments(
            stages,
            run_uri=uri,  # nothing is read from it but the checkpoint, and nothing written
            checkpoint_uri=uri,
            family=model.shape.family,
            dtype=model.shape.dtype,
            model_store=request.model_store,
        )

    def measured(self) -> dict[str, Any]:
        """Return the medians over the rounds, and the rounds; a first warm-up round is dropped."""
        while True:
            try:
                loads = [
                    (slot, self._pool.call(slot, "load", assignment, label="load"))
                    for slot, assignment in enumerate(self._assignments)
                ]
                self._answers(loads)
                rounds = [self._round() for _ in range(1 + self._request.rounds)][1:]
            except _AgainError:
                continue
            return {
                "prefill_tokens_per_second": statistics.median(r[0] for r in rounds),
                "decode_tokens_per_second": statistics.median(r[1] for r in rounds),
                "peak_bytes": sum(self._held),
                "rounds": [list(each) for each in rounds],
                "stages": len(self._assignments),
            }

    def _round(self) -> tuple[float, float]:
        """Return prefill and decode tokens per second, from the first call to the last token id."""
        batch, prompt = self._request.batch, self._request.prompt
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
        new_tokens = batch * self._request.new_tokens
        return batch * prompt / (prefilled - begun), new_tokens / decode_seconds

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
