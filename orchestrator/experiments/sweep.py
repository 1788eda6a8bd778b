"""One calibration, many results: every method at every size, and their Pareto front."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from actors import methods
from actors.storage.files import Directory
from orchestrator.backend import preemption, ray_cluster
from orchestrator.backend.executor import Executor
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.allocate import measured
from orchestrator.phases.calibrate import calibrate
from orchestrator.phases.context import RunContext, new_pool
from orchestrator.phases.evaluate import evaluate, evaluation_plan, settled
from orchestrator.phases.open_run import check_run, open_run, recipe_of
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared, dense_subject
from orchestrator.report import render_pareto
from orchestrator.run import compress_and_evaluate
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Journal, Listener
from orchestrator.rundir.ledger import Ledger
from planners.errors import ConfigError, PlanError
from planners.memory.placement import shared_bytes
from planners.spelling import did_you_mean

PARETO = "pareto.json"
PAGE = "pareto.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One result of a sweep.

    Attributes:
        name: of its folder below ``points/``.
        method: a file of ``actors/methods``.
        asked: keep_fraction that was asked for.
        keep_fraction: true fraction of the result.
        parameters: of the result.
        predicted_error: mean relative error that its layers reported before anything was measured.
        perplexity: measured.
        seconds: of compression and evaluation.
        options: of the method, complete.
        on_front: no other point is both smaller and better.
    """

    name: str
    method: str
    asked: float
    keep_fraction: float
    parameters: int
    predicted_error: float
    perplexity: float
    seconds: float
    options: Mapping[str, Any]
    on_front: bool = False


def points_of(
    base: Prepared, names: Sequence[str], fractions: Sequence[float], options: Mapping[str, str]
) -> list[Prepared]:
    """Return the runs of a sweep, each below ``points/`` of the run that has the statistics.

    Raises:
        ConfigError: a method or an option does not exist, or no method has it.
        PlanError: a target is out of a method's reach.
    """
    if base.former:
        raise ConfigError(
            f"{base.run.uri}: is a run of several steps; a sweep needs a run of one method",
            hint="run the first method alone, and sweep that run",
        )
    known = {name: {option.name for option in methods.spec(name).options} for name in names}
    unused = set(options).difference(*known.values())
    if unused:
        raise ConfigError(f"options.{min(unused)}: none of {', '.join(names)} has such an option")
    return [
        _point(base, name, fraction, {k: v for k, v in options.items() if k in known[name]})
        for name in names
        for fraction in fractions
    ]


def sweep(base: Prepared, points: Sequence[Prepared], *, listener: Listener) -> dict[str, Any]:
    """Calibrate once for all points, compress and measure each, and write the front.

    Raises:
        CompressionError: see `planners.errors`; what is done is kept.
    """
    config = base.config
    with lease.held(base.run), ray_cluster.connected(
        config.address,
        num_cpus=config.workers * config.threads,
        num_gpus=config.workers if config.device == "cuda" else 0,
        store_bytes=config.workers * shared_bytes(base.plan.waves[0]),
    ), preemption.watchers(config.address) as watchers:  # fmt: skip
        return sweep_on(base, points, RayExecutor(watchers=watchers), listener=listener)


def sweep_on(
    base: Prepared, points: Sequence[Prepared], executor: Executor, *, listener: Listener
) -> dict[str, Any]:
    """Do a sweep on an executor; every phase skips the units that have a record."""
    wanted = frozenset(s for point in points for s in point.statistics)
    base = replace(base, extra_statistics=wanted)
    open_run(base)
    for point in points:
        check_run(point)
    journal = Journal(base.run, listener)
    pool = new_pool(base, executor, journal)
    try:
        # The points read only this directory, so it gets statistics reused from elsewhere too.
        context = _context(replace(base, statistics_uri=""), pool, journal)
        calibrate(context)
        for point in {point.spec.name: point for point in points}.values():
            # Curves do not depend on the requested size: they are measured once, here.
            own = replace(point, extra_statistics=wanted)
            measured(replace(context, prepared=own, form=point.plan.form))
        measuring = settled(context, evaluation_plan(base), dense_subject(base))
        dense = evaluate(context, measuring, dense_subject(base))
        found = []
        for number, point in enumerate(points, start=1):
            name = _name(point.spec.name, point.config.keep_fraction or 1.0)
            journal.emit("step", unit=name, detail=f"point {number} of {len(points)}")
            found.append(_measure(point, pool, listener))
    finally:
        pool.close()
        journal.flush()
    document = {
        "model": base.config.model,
        "dense": {"perplexity": dense.perplexity, "parameters": base.plan.parameters_before},
        "points": [asdict(point) for point in with_front(found)],
    }
    base.run.write(PARETO, json.dumps(document, indent=1, sort_keys=True).encode())
    base.run.write(PAGE, render_pareto(document).encode())
    return document


def with_front(points: Sequence[Point]) -> list[Point]:
    """Return the points, smallest first; those on the Pareto front are marked."""
    ordered = sorted(points, key=lambda p: (p.keep_fraction, p.perplexity))
    marked = []
    for point in ordered:
        beaten = any(
            o.keep_fraction <= point.keep_fraction
            and o.perplexity <= point.perplexity
            and (o.keep_fraction, o.perplexity) != (point.keep_fraction, point.perplexity)
            for o in ordered
        )
        marked.append(replace(point, on_front=not beaten))
    return marked


def exported(run: Directory, point: str) -> Prepared:
    """Return the run that verifies one point of a sweep, times it and marks it READY.

    Raises:
        ConfigError: the sweep has no such point.
    """
    if run.size(PARETO) is None:
        raise ConfigError(f"{run.uri}: has no sweep", hint="compress-cluster sweep RUN first")
    known = [p["name"] for p in json.loads(run.read(PARETO))["points"]]
    if point not in known:
        raise ConfigError(
            f"--point {point}: there is no such point{did_you_mean(point, known)}",
            hint=f"there are: {', '.join(known)}",
        )
    config = recipe_of(Directory(run.below(f"points/{point}")))
    return prepare(config.model_copy(update={"stats": run.uri}))


def _context(prepared: Prepared, pool: Pool, journal: Journal) -> RunContext:
    reuse = Directory(prepared.statistics_uri) if prepared.statistics_uri else None
    return RunContext(
        prepared=prepared, form=prepared.plan.form, run=prepared.run,
        ledger=Ledger(prepared.run, reuse=reuse), journal=journal, pool=pool,
    )  # fmt: skip


def _measure(prepared: Prepared, pool: Pool, listener: Listener) -> Point:
    open_run(prepared)
    journal = Journal(prepared.run, listener)
    context = _context(prepared, pool, journal)
    try:
        context, losses = compress_and_evaluate(context)
    finally:
        journal.flush()
    after = context.parameters_after
    ends = [e for e in journal.events if e["kind"] == "phase ends"]
    return Point(
        name=_name(prepared.spec.name, prepared.config.keep_fraction or 1.0),
        method=prepared.spec.name,
        asked=prepared.config.keep_fraction or 1.0,
        keep_fraction=after / prepared.plan.parameters_before,
        parameters=after,
        predicted_error=_predicted(context),
        perplexity=losses["compressed"].perplexity,
        seconds=sum(event["seconds"] for event in ends),
        options=dict(prepared.options),
    )


def _predicted(context: RunContext) -> float:
    """Return the mean of the relative errors that units reported from their spectra."""
    errors: list[float] = []
    for unit in context.units:
        values = context.ledger.record(unit).values
        kept, said = values.get("energy_kept"), values.get("errors", {})
        if isinstance(kept, float):
            errors.append(max(0.0, 1 - kept) ** 0.5)
        if isinstance(said, Mapping):
            errors += [float(v) for v in said.values()]
    return sum(errors) / len(errors) if errors else 0.0


def _point(base: Prepared, method: str, fraction: float, options: Mapping[str, str]) -> Prepared:
    """Return the run of one method at one size, on the statistics of the base."""
    if not 0 < fraction <= 1:
        raise PlanError(f"--keep-fraction {fraction}: must be above 0 and up to 1")
    return prepare(
        base.config.model_copy(
            update={
                "method": method,
                "options": dict(options),
                "layer_options": {},
                "keep_fraction": fraction,
                "slice": None,
                "out": base.run.below(f"points/{_name(method, fraction)}"),
                "stats": base.config.out,
                "keep_statistics": False,
            }
        )
    )


def _name(method: str, fraction: float) -> str:
    return f"{method}-{fraction:g}"
