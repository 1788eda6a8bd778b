"""One calibration, many results: every method at every size, and their Pareto front."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from actors import methods
from actors.storage.files import Directory
from orchestrator.backend import preemption, ray_cluster
from orchestrator.backend.executor import Executor
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.worker_pool import Pool
from orchestrator.phases.allocate import measured
from orchestrator.phases.calibrate import calibrate, tell_missing
from orchestrator.phases.context import RunContext, new_pool
from orchestrator.phases.evaluate import evaluate, evaluation_plan, settled
from orchestrator.phases.open_run import check_run, open_run, recipe_of
from orchestrator.phases.stored import storage
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared, dense_subject
from orchestrator.recipe.config import RunConfig
from orchestrator.recipe.reading import load_config
from orchestrator.report import render_pareto
from orchestrator.report.pareto import UNIFORM
from orchestrator.run import compress_and_evaluate
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Journal, Listener
from orchestrator.rundir.layout import READY
from orchestrator.rundir.ledger import Ledger
from planners.budget.schemes import QUANTISER, SCHEMES, TIE, scheme_named
from planners.errors import ConfigError
from planners.memory.placement import shared_bytes
from planners.method import SIZES
from planners.model.cost import dense_model_form, model_bytes
from planners.model.scheme import WHOLE_ROW
from planners.spelling import did_you_mean

PARETO = "pareto.json"
PAGE = "pareto.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One result of a sweep.

    Attributes:
        name: of its folder below ``points/``.
        method: a file of ``actors/methods``.
        asked: size that was asked for, such as ``80 %``, ``3GB``, ``3.5 bits`` or ``4/32``.
        keep_fraction: true fraction of the result.
        parameters: of the result.
        bytes: of its tensors, as stored.
        bits: for each weight of the input's linears, scales included; None if not quantised.
        line: of the plot that it belongs to: its method, or `UNIFORM`.
        predicted_error: mean relative error that its layers reported before anything was measured.
        perplexity: measured.
        seconds: of compression and evaluation.
        options: of the method, complete.
        on_front: no other point is both smaller and better.
    """

    name: str
    method: str
    asked: str
    keep_fraction: float
    parameters: int
    bytes: int
    predicted_error: float
    perplexity: float
    seconds: float
    options: Mapping[str, Any]
    bits: float | None = None
    line: str = ""
    on_front: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The points of a sweep.

    Attributes:
        names: of the methods.
        sizes: each the key of a recipe and its value, such as ``keep_bytes`` and ``3GB``; every
            method is done at each.
        uniform: schemes such as ``4/32``; each is a point with all linears so.
        options: of the methods.
        dtype: of what is not quantised; empty where it is that of the run.
    """

    names: Sequence[str] = ()
    sizes: Sequence[tuple[str, float | str]] = ()
    uniform: Sequence[str] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    dtype: str = ""


def points_of(base: Prepared, wanted: Wanted) -> list[Prepared]:
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
    names = list(dict.fromkeys((*wanted.names, *([QUANTISER] if wanted.uniform else []))))
    known = {name: {option.name for option in methods.spec(name).options} for name in names}
    unused = set(wanted.options).difference(*known.values())
    if unused:
        raise ConfigError(f"options.{min(unused)}: none of {', '.join(names)} has such an option")

    def own(name: str) -> dict[str, Any]:
        return {k: v for k, v in wanted.options.items() if k in known[name]}

    found = [
        _point(base, name, size, own(name), wanted.dtype)
        for name in wanted.names
        for size in wanted.sizes
    ]
    for named in wanted.uniform:
        shared = {k: v for k, v in own(QUANTISER).items() if k not in (SCHEMES.name, TIE.name)}
        options = {**shared, **_one_scheme(named)}
        found.append(_point(base, QUANTISER, None, options, wanted.dtype))
    return found


def _one_scheme(named: str) -> dict[str, Any]:
    """Return the options of GPTQ with one scheme for all linears."""
    scheme = scheme_named(named, "--uniform")
    return {
        "bits": scheme.bits,
        "group": 0 if scheme.group == WHOLE_ROW else scheme.group,
        "symmetric": scheme.symmetric,
        "uneven": "smaller",
    }


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
        tell_missing(context, base.run.uri if base.run.size(READY) is not None else "")
        calibrate(context)
        for point in {_measures(point): point for point in points}.values():
            # Curves do not depend on the requested size: they are measured once, here.
            own = replace(point, extra_statistics=wanted)
            measured(replace(context, prepared=own, form=point.plan.form))
        measuring = settled(context, evaluation_plan(base), dense_subject(base))
        dense = evaluate(context, measuring, dense_subject(base))
        found = []
        for number, point in enumerate(points, start=1):
            name = _name(point)
            journal.emit("step", unit=name, detail=f"point {number} of {len(points)}")
            found.append(_measure(point, pool, listener))
    finally:
        pool.close()
        journal.flush()
    shape = base.plan.shape
    over = "bytes" if any(_size(point) != "keep_fraction" for point in points) else "keep_fraction"
    document = {
        "model": base.config.model,
        "over": over,
        "dense": {
            "perplexity": dense.perplexity,
            "parameters": base.plan.parameters_before,
            "bytes": model_bytes(shape, dense_model_form(shape)),
        },
        "points": [asdict(point) for point in with_front(found, over=over)],
    }
    base.run.write(PARETO, json.dumps(document, indent=1, sort_keys=True).encode())
    base.run.write(PAGE, render_pareto(document).encode())
    return document


def with_front(points: Sequence[Point], *, over: str = "keep_fraction") -> list[Point]:
    """Return the points, smallest first; those on the Pareto front are marked.

    Args:
        points: of a sweep.
        over: what their size is, ``keep_fraction`` or ``bytes``.
    """

    def place(point: Point) -> tuple[float, float]:
        return getattr(point, over), point.perplexity

    ordered = sorted(points, key=place)
    marked = []
    for point in ordered:
        size, perplexity = place(point)
        beaten = any(
            o[0] <= size and o[1] <= perplexity and o != (size, perplexity)
            for o in map(place, ordered)
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
    stored = storage(context)
    return Point(
        name=_name(prepared),
        method=prepared.spec.name,
        asked=_asked(prepared),
        keep_fraction=after / prepared.plan.parameters_before,
        parameters=after,
        bytes=stored["after"],
        bits=stored["bits"]["of_input"] if stored["quantised"] else None,
        line=prepared.spec.name if prepared.config.target.asked else UNIFORM,
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
        rounding = values.get("rounding", {})
        if isinstance(kept, float):
            errors.append(max(0.0, 1 - kept) ** 0.5)
        if isinstance(said, Mapping):
            errors += [float(v) for v in said.values()]
        if isinstance(rounding, Mapping):
            errors += [float(v) for v in rounding.get("errors", {}).values()]
    return sum(errors) / len(errors) if errors else 0.0


def _point(
    base: Prepared,
    method: str,
    size: tuple[str, float | str] | None,
    options: Mapping[str, Any],
    dtype: str,
) -> Prepared:
    """Return the run of one method at one size, on the statistics of the base."""
    said = _one_name(options) if size is None else _size_name(*size)
    if size is not None:
        load_config(None, dict([size]))  # refuses a value that it cannot have
    own = {
        "method": method,
        "options": dict(options),
        "layer_options": {},
        **{key: RunConfig.model_fields[key].default for key in SIZES},
        **dict([size] if size else []),
        **({"dtype": dtype} if dtype else {}),
        "out": base.run.below(f"points/{method}-{said}"),
        "stats": base.config.out,
        "keep_statistics": False,
    }
    return prepare(base.config.model_copy(update=own))


def _one_name(options: Mapping[str, Any]) -> str:
    group = f"g{options['group']}" if options["group"] else "row"
    return f"{options['bits']}bit-{group}" + ("" if options["symmetric"] else "z")


def _size_name(key: str, size: float | str) -> str:
    return size if isinstance(size, str) else f"{size:g}{'bits' if key == 'bits' else ''}"


def _size(prepared: Prepared) -> str:
    """Return the key of a recipe that sets a point's size; empty where options do."""
    return next(iter(prepared.config.target.asked), "")


def _asked(prepared: Prepared) -> str:
    """Return what is asked of a point, in words."""
    config, options = prepared.config, prepared.options
    named = {
        "keep_fraction": f"{100 * (config.keep_fraction or 1):g} %",
        "keep_bytes": config.keep_bytes,
        "bits": f"{config.bits or 0:g} bits",
    }
    return named.get(_size(prepared)) or f"{options['bits']}/{options['group'] or 'row'}"


def _measures(prepared: Prepared) -> tuple[Any, ...]:
    """Return what the measurements of a point depend on: points that agree share them."""
    return prepared.spec.name, tuple(sorted(prepared.options.items()))


def _name(prepared: Prepared) -> str:
    return prepared.run.uri.rpartition("/")[2]
