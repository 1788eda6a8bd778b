"""The forecast of a run: the plan, and by simulation its time, money and lost workers.

A model of which only the config is known needs no weights and no tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from actors import methods
from actors.storage.checkpoint import read_config
from actors.storage.files import Directory
from actors.storage.hub import SCHEME
from actors.storage.sources import hub_place
from orchestrator.forecast.clocks import ProfileKey, estimated_clock, kept_clock
from orchestrator.forecast.layer_times import layer_times
from orchestrator.forecast.pricing import Devices, Pricing
from orchestrator.forecast.sample_run import measure
from orchestrator.prepare.evaluation_plan import exact_dtype
from orchestrator.prepare.machine import workload_of
from orchestrator.prepare.prepare import longest_sequence
from orchestrator.prepare.prepared import Prepared, with_workspace
from orchestrator.prepare.recovery import recovery_of
from orchestrator.prepare.steps import StepInput, planned, started
from orchestrator.recipe.config import DEFAULT_SEQUENCE_LENGTH, RunConfig
from orchestrator.recipe.method_options import chosen_methods, resolve_options, resolve_steps
from orchestrator.rundir.statistics import list_
from planners.batching import batching_of
from planners.calibration import few_tokens
from planners.canonical_json import to_json
from planners.catalogue import CONFIGS
from planners.errors import ConfigError, ModelError, PlanError, StorageError
from planners.families import family_of
from planners.method import MethodSpec, Option, Target
from planners.model.serving_load import LayerTimes
from planners.model.taps import Statistic, layer_statistics
from planners.plan import RunPlan
from planners.simulation.simulate import Risk, RunForecast, num_calls, outlook
from planners.simulation.timetable import (
    CostModel,
    download_bytes,
    phase_work,
    timetable,
    transfer_bytes,
)
from planners.spelling import did_you_mean
from planners.steps import require_disjoint
from planners.units.job import Job
from planners.units.kinds import PHASES, kinds_of
from planners.units.work import Work

SEQUENCES = 128  # of calibration, where the recipe does not say
DRAWS, FEWEST = 100, 20  # simulated runs that a quantile is taken from; fewer of a large cluster
CALLS = 100_000  # that are simulated in all, in about a second
WORKER_SPREAD = 0.03  # of the logarithm of how fast one worker is
DETECTION_SECONDS = 15.0  # until the loss of a worker is noticed and its slot filled


PASSES = ("calibrate", "allocate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A plan with its time, money and lost workers.

    Attributes:
        job: the plan with its method and data.
        num_workers: that work on it.
        device: what they are.
        terms: what was asked for.
        clock: how long tasks take; None where nothing is known of the device.
        outlook: time, money and losses; None likewise.
        asked: the size that is asked for, under its name in a recipe.
        times: of layers by width, if they were timed for the plan.
    """

    job: Job
    num_workers: int
    device: str
    terms: Pricing
    clock: CostModel | None
    outlook: RunForecast | None
    asked: Mapping[str, float] = field(default_factory=dict)
    times: LayerTimes | None = None

    @property
    def of_speed(self) -> bool:
        """Whether a speed-up is asked for, so widths are not known before layers are timed."""
        return "speedup" in self.asked

    @property
    def plan(self) -> RunPlan:
        """Widths, stages, waves and bytes; for several steps those of the last."""
        return self.job.plan

    @property
    def steps(self) -> list[Job]:
        """All steps in order; a single one for one method."""
        return [*self.job.former, self.job]

    @property
    def few_tokens(self) -> list[str]:
        """Warnings for widths with fewer calibration tokens."""
        found = [
            few_tokens(
                job.plan.shape,
                job.spec.statistics(job.plan.shape, job.options),
                tokens=job.data.tokens,
                sequence_length=job.data.sequence_length,
                start=job.start,
            )
            for job in self.steps
        ]
        return list(dict.fromkeys(filter(None, found)))

    def notes(self, work: Mapping[str, Work]) -> list[str]:
        """Return what else is to be known of the times, given the work of each phase."""
        found = list(self.clock.notes) if self.clock else []
        passes, measuring = (work[name].flops if name in work else 0 for name in PASSES)
        if measuring > passes > 0:
            found.append(
                f"measuring the damage of cuts takes {measuring / passes:.1f} times the operations "
                "of the calibration pass"
            )
        return found

    @property
    def worker_bytes(self) -> int:
        """Peak bytes of the fullest worker of any step."""
        return max(job.plan.worker_bytes for job in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Peak disk use; files of a step are kept until the next one is done."""
        disks = [job.plan.disk_bytes for job in self.steps]
        return max((a + b for a, b in pairwise(disks)), default=disks[-1])

    def to_json(self) -> dict[str, Any]:
        """Return time, money, work and transfers as plain data."""
        work = phase_work(self.job)
        return {
            "workers": self.num_workers,
            "device": self.device,
            "worker_bytes": self.worker_bytes,
            "price_per_hour": self.terms.price_per_hour,
            "preemptions_per_hour": self.terms.preemptions_per_hour,
            "source": self.clock.source if self.clock else "nothing is known of the device",
            "notes": self.notes(work),
            "few_tokens": self.few_tokens,
            "flops": {name: task.flops for name, task in work.items()},
            "transfer_bytes": transfer_bytes(self.job),
            "download_bytes": download_bytes(self.job),
            **(to_json(self.outlook) if self.outlook else {}),
        }


def config_of(model: str) -> dict[str, Any] | None:
    """Return a model's config if it is known without weights, else None."""
    if model in CONFIGS:
        return dict(CONFIGS[model])
    directory = Directory(model)
    if "://" in model or directory.is_local:
        return read_config(directory) if directory.size("config.json") else None
    return None


def forecast(config: RunConfig, devices: Devices | None, terms: Pricing) -> Forecast:
    """Return the forecast of a recipe for a model of which only the config is known.

    Raises:
        ConfigError: an option is wrong, or the target is out of reach.
        ModelError: the config is missing, or not of a supported model.
        PlanError: a layer does not fit a worker; the message says by how many bytes.
    """
    found = config_of(config.model)
    if found is None:
        raise ModelError(
            f"{config.model}: its config is not known without a download"
            + did_you_mean(config.model, CONFIGS),
            hint=f"give a directory with a config.json, or one of: {', '.join(CONFIGS)}",
        )
    dtype = str(found.get("dtype") or found.get("torch_dtype") or "float32")
    shape = family_of(found.get("model_type")).shape_of(found, dtype)
    named = [methods.spec(step.method) for step in config.chain]
    options = resolve_steps(config, named)
    steps = list(zip(chosen_methods(config, options), options, strict=True))
    require_disjoint(steps)
    longest = min(DEFAULT_SEQUENCE_LENGTH, longest_sequence(found))
    length = config.calibration.sequence_length or longest
    sequences = config.calibration.sequences or SEQUENCES
    workers = devices.count if devices else config.workers
    memory = devices.bytes if devices else int((config.worker_gib or 1e6) * 2**30)
    device = devices.name if devices else "CPU"
    asked = config.calibration_dtype
    batching = batching_of(
        sequences,
        length,
        microbatch_tokens=config.calibration.microbatch_tokens,
        dtype=exact_dtype(device.lower(), dtype) if asked == "auto" else asked,
        shards=config.calibration.shards,
    )
    recipes = workload_of(config, batching, device=device.lower())
    recovery = recovery_of(config, sequences, length)
    work = replace(recipes, num_workers=workers, worker_bytes=memory)
    evaluated = (config.evaluation.sequences or SEQUENCES) * length
    source = StepInput(config=found, shape=shape, start=started(shape, config.dtype))
    # A run on one machine downloads the model beforehand.
    shared = devices is not None or config.address != "local" or config.model.startswith(SCHEME)
    from_hub = shared and hub_place(config.model) is not None
    jobs: list[Job] = []
    for index, step in enumerate(steps):
        path = f"steps[{index}]" if config.steps else ""
        others = [] if config.steps else other_methods(step[0])
        target = with_workspace(config.targets[index], source.shape, source.start)
        last = index == len(steps) - 1
        own = replace(work, recovery=recovery if last else None)
        plan = planned(step, target, source, own, path=path, others=others)
        jobs.append(
            Job(
                plan=plan,
                spec=step[0],
                options=step[1],
                data=batching,
                evaluation_tokens=evaluated,
                start=source.start.form,
                former=tuple(jobs),
                from_hub=from_hub and not jobs,
                recovery=own.recovery,
            )
        )
        if not last:
            source = source.after(plan.form)
    targets = config.targets
    of_device = "cpu" if device.upper() == "CPU" else "cuda"
    settings = _settings(found, jobs, targets, device=of_device, threads=config.threads)
    return _looked_ahead(jobs[-1], settings, num_workers=workers, device=device, terms=terms)


def forecast_of(prepared: Prepared, terms: Pricing, *, calibrated: bool = False) -> Forecast:
    """Return the forecast of a prepared run.

    Args:
        prepared: the run.
        terms: what workers cost and how long they last.
        calibrated: it will find all its statistics, as a later run of a batch does.

    Raises:
        ConfigError: the run is to be measured on a device that this machine does not have.
        ClusterError: it could not be measured.
    """
    config, chain = prepared.config, (*prepared.former, prepared)
    origin = prepared.origin
    reused = (
        origin.spec.statistics(origin.plan.shape, origin.options) if calibrated else _kept(origin)
    )
    jobs: list[Job] = []
    for step in chain:
        jobs.append(
            Job(
                plan=step.plan,
                spec=step.spec,
                options=step.options,
                data=prepared.identity.batching,
                evaluation_tokens=int(prepared.evaluation.size),
                start=step.start.form,
                former=tuple(jobs),
                from_hub=not jobs and step.model_uri.startswith(SCHEME),
                carried=bool(step.former) and step.former[-1].carries,
                reused=reused if step is prepared.origin else frozenset(),
                recovery=step.recovery,
            )
        )
    targets = [step.config.target for step in chain]
    first = origin.model_config
    settings = _settings(first, jobs, targets, device=config.device, threads=config.threads)
    device = "CPU" if config.device == "cpu" else _accelerator()
    workers = max(job.plan.num_workers for job in jobs)
    found = _looked_ahead(jobs[-1], settings, num_workers=workers, device=device, terms=terms)
    if terms.measure and config.speedup is not None:
        return replace(found, times=layer_times(prepared))
    return found


def _kept(prepared: Prepared) -> frozenset[Statistic]:
    """Return the statistics that a run reuses from another."""
    uri = prepared.statistics_uri
    try:
        rows = list_(Directory(uri)) if uri else []
    except StorageError:
        return frozenset()  # it kept none: all of them are summed
    held = {row["layer"]: set(row["taps"]) for row in rows}
    shape = prepared.plan.shape
    wanted = prepared.spec.statistics(shape, prepared.options)
    lacking = {
        statistic
        for layer in range(shape.num_layers)
        for statistic in layer_statistics(shape, wanted, layer)
        if str(statistic) not in held.get(layer, ())
    }
    return wanted - lacking


def _settings(
    config: Mapping[str, Any],
    jobs: Sequence[Job],
    targets: Sequence[Target],
    *,
    device: str,
    threads: int,
) -> list[ProfileKey]:
    """Return the setting to time for each step: its method on the input model of the run.

    A later step is timed at the cut that it makes itself.
    """
    found, before = [], 1.0
    for job, target in zip(jobs, targets, strict=True):
        if target.keep_fraction is not None and before < 1:
            target = Target(keep_fraction=min(1.0, target.keep_fraction / before))
        setting = ProfileKey(
            config=config,
            shape=job.dense,
            method=job.spec.name,
            options=job.options,
            target=target,
            data=job.data,
            device=device,
            threads=threads,
        )
        found.append(setting)
        before = job.plan.keep_fraction
    return found


def other_methods(spec: MethodSpec) -> list[tuple[MethodSpec, dict[str, Option]]]:
    """Return all methods but one, with their defaults: another may fit."""
    specs = [methods.spec(name) for name in methods.available() if name != spec.name]
    return [(each, resolve_options(each, {})) for each in specs]


def _looked_ahead(
    job: Job, settings: Sequence[ProfileKey], *, num_workers: int, device: str, terms: Pricing
) -> Forecast:
    clocks = [_clock(setting, device, terms) for setting in settings]
    known = [clock for clock in clocks if clock is not None]
    clock, found = None, None
    if len(known) == len(clocks):
        *former, last = known
        clock = _said_of_all(known)
        risk = Risk(
            spread={name: clock.spread_of(*kinds_of(name, many=True)) for name in PHASES}
            | {"": clock.spread},
            worker_spread=WORKER_SPREAD,
            losses_per_hour=terms.preemptions_per_hour,
            restart_seconds=clock.start_seconds + DETECTION_SECONDS,
        )
        phases = timetable(job, last, former=former)
        draws = CALLS // max(1, num_calls(phases))
        found = outlook(
            phases,
            num_workers=num_workers,
            risk=risk,
            driver_seconds=clock.driver_seconds,
            price_per_hour=terms.price_per_hour,
            draws=min(DRAWS, max(FEWEST, draws)),
        )
    return Forecast(
        job=job,
        num_workers=num_workers,
        device=device,
        terms=terms,
        clock=clock,
        outlook=found,
        asked=settings[-1].target.asked,
    )


def _said_of_all(clocks: Sequence[CostModel]) -> CostModel:
    """Return the last step's clock with the samples, notes and widest spreads of all steps."""
    last = clocks[-1]
    if len(clocks) == 1:
        return last
    samples = dict(last.samples)
    for clock in clocks[:-1]:
        for kind, sample in clock.samples.items():
            if kind not in samples or samples[kind].spread < sample.spread:
                samples[kind] = sample
    notes = dict.fromkeys(note for clock in clocks for note in clock.notes)
    sources = list(dict.fromkeys(clock.source for clock in clocks))
    said = "each step is timed on the input model"
    return replace(
        last,
        samples=samples,
        spread=max(clock.spread for clock in clocks),
        source="; ".join(sources),
        notes=(*notes, *((said,) if samples else ())),
    )


def _clock(setting: ProfileKey, device: str, terms: Pricing) -> CostModel | None:
    """Return a measured clock, if this machine is like the workers, or else an estimate."""
    here = _accelerator().upper()
    at_hand = setting.device == "cpu" or bool(here and device.upper() in here)
    if terms.measure and not at_hand:
        raise ConfigError(
            f"--measure: this machine has no {device}",
            hint="remove --measure, or run the command on a machine like the workers",
        )
    if terms.measure:
        return measure(setting)
    kept = kept_clock(setting) if at_hand else None
    if kept is not None:
        return kept
    try:
        return estimated_clock(setting, device)
    except PlanError:
        return None  # the plan then shows no time


def _accelerator() -> str:
    import torch

    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else ""
