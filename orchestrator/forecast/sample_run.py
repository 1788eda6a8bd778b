"""The time of a layer on this machine: measured once, kept, and used by every later plan.

A model of one or two layers of the true shapes, with random weights and tokens, goes through the
phases of a run in a process of its own, and every call is timed. Where that would take too long or
too much memory, a smaller model is timed and the times are scaled by operations; the notes say so.
"""

import contextlib
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from actors import methods
from actors.storage.files import Directory
from actors.storage.sample_model import write_sample
from orchestrator.backend.local import LocalExecutor
from orchestrator.forecast.clocks import ProfileKey, device_name, keep_clock
from orchestrator.phases.allocate import measured
from orchestrator.phases.context import RunContext, new_evaluator, new_pool
from orchestrator.phases.evaluate import evaluate, evaluation_plan
from orchestrator.phases.open_run import open_run
from orchestrator.phases.shrink import shrink
from orchestrator.phases.stitch import stitched
from orchestrator.phases.throughput import throughput
from orchestrator.phases.verify import verify
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared, dense_subject
from orchestrator.recipe.reading import load_config
from orchestrator.rundir.journal import Event, Journal
from orchestrator.rundir.ledger import Ledger
from planners.batching import TokenBatching
from planners.calibration import shard_cuts
from planners.errors import ClusterError, NumericsError, PlanError
from planners.method import Target
from planners.model.cost import dense_start, model_parameters
from planners.model.form import ModelForm
from planners.model.shape import ModelShape
from planners.planning import Workload, make_plan
from planners.simulation.devices import rates_of
from planners.simulation.timetable import (
    CostModel,
    Sample,
    phase_work,
    stage_load_work,
    step_work,
    throughput_work,
    unit_work,
    verify_work,
)
from planners.units.job import Job
from planners.units.kinds import PHASES
from planners.units.units import Unit
from planners.units.work import CALL, Work, publish_work

BUDGET_SECONDS = 180.0  # that a sample may be expected to take
PATIENCE = 4  # times the budget until it is given up
MEMORY_SHARE = 0.6  # of what is free, that a sample may be planned with
MICROBATCHES, EVALUATED = 4, 3  # of a sample
MIN_SPREAD, MIN_SAMPLES = 0.02, 3
NO_LIMIT = 2**60


@dataclass(frozen=True, slots=True, kw_only=True)
class _ProfileModel:
    """A setting with the sizes that are timed."""

    setting: ProfileKey
    num_layers: int
    shape: ModelShape
    data: TokenBatching
    form: ModelForm
    note: str


def measure(setting: ProfileKey, *, budget_seconds: float = BUDGET_SECONDS) -> CostModel:
    """Time a sample of a setting on this machine, store the result, and return the clock.

    Raises:
        ClusterError: not even the smallest sample finished in time.
    """
    for specimen in _specimens(setting, budget_seconds):
        found = _in_process_of_its_own(specimen, seconds=PATIENCE * budget_seconds)
        if found is None:
            continue
        keep_clock(setting, found)
        return found
    raise ClusterError(
        "no sample of this model could be timed on this machine in the time given",
        hint="without --measure the plan is estimated",
    )


def _specimens(setting: ProfileKey, budget_seconds: float) -> Iterator[_ProfileModel]:
    """Yield samples that fit memory and time, the closest to the real sizes first."""
    memory = _free_bytes(setting.device) * MEMORY_SHARE
    rates = _rates(setting)
    for scale in (1, 2, 4, 8, 16):
        for num_layers, tokens_share in ((2, 1), (1, 1), (1, 4)):
            specimen = _specimen(setting, scale, num_layers, tokens_share)
            if specimen is None:
                continue
            job = _job(specimen)
            layer = job.plan.bytes_before / max(num_layers, 1)
            seconds = sum(task.seconds(rates) for task in phase_work(job).values())
            if job.plan.worker_bytes + layer < memory and seconds < budget_seconds:
                yield specimen


def _specimen(
    setting: ProfileKey, scale: int, num_layers: int, tokens_share: int
) -> _ProfileModel | None:
    shape, data = setting.shape, setting.data
    if shape.num_heads % scale or shape.hidden % (8 * scale):
        return None
    length = data.sequence_length
    sequences = max(1, data.microbatch_tokens // length // tokens_share)
    if tokens_share > 1 and sequences == data.microbatch_tokens // length:
        length = max(2, length // tokens_share)
    small = replace(
        shape,
        num_layers=num_layers,
        hidden=shape.hidden // scale,
        intermediate=shape.intermediate // scale,
        num_heads=shape.num_heads // scale,
        num_kv_heads=max(1, shape.num_kv_heads // scale),
        vocab_size=max(16, shape.vocab_size // scale),
    )
    if small.num_heads % small.num_kv_heads:
        return None
    spec = methods.chosen(setting.method, setting.options)
    try:
        full = replace(small, num_layers=shape.num_layers)
        whole = spec.form(full, dense_start(full), setting.target, setting.options)
    except PlanError:
        return None
    layers = (*whole.layers[: num_layers - 1], whole.layers[-1])
    said = []
    if scale > 1:
        said.append(f"1/{scale} of the widths")
    if length != data.sequence_length or sequences * length != data.microbatch_tokens:
        said.append(f"microbatches of {sequences * length} tokens")
    note = (
        f"timed on {' and '.join(said)}; larger sizes are scaled by their operations"
        if said
        else ""
    )
    return _ProfileModel(
        setting=setting,
        num_layers=num_layers,
        shape=small,
        data=replace(
            data,
            sequences=MICROBATCHES * sequences,
            sequence_length=length,
            microbatch_sequences=sequences,
        ),
        form=replace(whole, layers=layers),
        note=note,
    )


def _job(specimen: _ProfileModel) -> Job:
    """Return the run of a specimen as the planners see it."""
    data, setting, shape = specimen.data, specimen.setting, specimen.shape
    spec = methods.chosen(setting.method, setting.options)
    plan = make_plan(
        shape,
        spec,
        setting.options,
        target=Target(keep_fraction=1.0),
        work=Workload(batching=data, num_workers=1, worker_bytes=NO_LIMIT),
    )
    after = model_parameters(shape, specimen.form)
    plan = replace(
        plan,
        form=specimen.form,
        parameters_after=after,
        bytes_after=after * plan.bytes_before // plan.parameters_before,
    )
    evaluated = EVALUATED * data.microbatch_tokens
    return Job(
        plan=plan, spec=spec, options=setting.options, data=data, evaluation_tokens=evaluated
    )


def _rates(setting: ProfileKey) -> Work:
    name = "CPU" if setting.device == "cpu" else "H100"
    rates = rates_of(name, setting.data.dtype, threads=setting.threads)
    assert rates is not None  # both are known
    return rates


def _free_bytes(device: str) -> float:
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else []:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024.0
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _in_process_of_its_own(specimen: _ProfileModel, *, seconds: float) -> CostModel | None:
    """Return the clock of a specimen; None if it did not finish in that time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, specimen), daemon=True)
    begun = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return None
        ours.recv()
        start_seconds = time.monotonic() - begun
        if not ours.poll(seconds):
            return None
        found: CostModel = ours.recv()
    except EOFError:  # killed for memory, most likely: a smaller one may live
        return None
    finally:
        process.kill()
        process.join()
    return replace(found, start_seconds=start_seconds)


def _work(end: Connection, specimen: _ProfileModel) -> None:
    end.send("ready")  # all that a worker imports is imported
    end.send(_timed(specimen))
    end.close()


class _TimingExecutor(LocalExecutor):
    """Runs every call in this process, and records the seconds of each kind."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.phases: dict[str, float] = defaultdict(float)
        self.suffix = ""
        self._kinds: dict[str, str] = {}

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Return finished tickets."""
        begun = time.monotonic()
        answer = super().call(handle, method, *args, num_returns=num_returns, label=label)
        if method in ("publish", "work"):  # and how long it takes, its second call says
            self._kinds[args[0].unit] = "statistics" if method == "publish" else args[0].kind
        elif method == "written":
            self.seconds[self._kinds[args[0]]].append(self.result(answer).seconds)
        else:
            kind = {
                "load": f"load{self.suffix}",
                "step": label.partition("[")[0] + self.suffix,
            }.get(method, method)
            self.seconds[kind].append(time.monotonic() - begun)
        return answer

    def on_event(self, event: Event) -> None:
        """Note how long a phase took."""
        if event["kind"] == "phase ends":
            self.phases[event["unit"]] += event["seconds"]


def _timed(specimen: _ProfileModel) -> CostModel:
    """Return the measured time of every kind of task of a run for a specimen."""
    watch, job = _TimingExecutor(), _job(specimen)
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        prepared = _prepared(specimen, Path(folder))
        open_run(prepared)
        journal = Journal(prepared.run, watch.on_event)
        context = RunContext(
            prepared=prepared,
            form=prepared.plan.form,
            run=prepared.run,
            ledger=Ledger(prepared.run),
            journal=journal,
            pool=new_pool(prepared, watch, journal),
        )
        _go_through(replace(context, form=specimen.form), watch)
    calls = [s for kind, found in watch.seconds.items() if kind not in ("verify", "throughput")
             for s in found]  # fmt: skip
    waited = sum(watch.phases[p.name] for p in PHASES.values() if p.by_workers) - sum(calls)
    watch.seconds["stitch"] = [watch.phases["stitch"]]
    setting = specimen.setting
    device, threads = device_name(setting.device), setting.threads
    return CostModel(
        rates=_rates(setting),
        samples={
            kind: _sample(seconds, _task(job, kind)) for kind, seconds in watch.seconds.items()
        },
        driver_seconds=max(0.0, waited / len(calls)),
        source=f"measured on {device}, {threads} thread{'s' if threads > 1 else ''}",
        notes=(specimen.note,) if specimen.note else (),
    )


def _go_through(context: RunContext, watch: _TimingExecutor) -> None:
    """Do the phases of a run in their order."""
    prepared = context.prepared
    plan = evaluation_plan(prepared)

    def keep_widths(calibrated: RunContext) -> RunContext:
        evaluate(calibrated, plan, dense_subject(prepared))
        measured(calibrated)
        return calibrated

    shrink(context, choose_widths=keep_widths)
    watch.suffix, process = "_compressed", new_evaluator(prepared, watch)
    evaluate(context, plan, stitched(context))
    with contextlib.suppress(NumericsError):  # what random weights generate proves nothing
        verify(context, stitched(context), process)
    throughput(context, [dense_subject(prepared), stitched(context)], process)


def _prepared(specimen: _ProfileModel, folder: Path) -> Prepared:
    """Write a specimen's model and tokens, and return a run of it."""
    setting, shape, data = specimen.setting, specimen.shape, specimen.data
    config = {
        **setting.config,
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "dtype": shape.dtype,
        "tie_word_embeddings": shape.tied,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][: shape.num_layers]
    model = folder / "model"
    count = data.microbatch_tokens // data.sequence_length
    sizes = {"calibration": MICROBATCHES * count, "evaluation": EVALUATED * count}
    sequences = {name: (number, data.sequence_length) for name, number in sizes.items()}
    write_sample(Directory(str(model)), config, sequences=sequences)
    recipe = {
        "model": str(model),
        "out": str(folder / "run"),
        "method": setting.method,
        "keep_fraction": 1.0,
        "calibration.source": f"tokens:{model}/calibration.safetensors",
        "calibration.microbatch_tokens": data.microbatch_tokens,
        "evaluation.source": f"tokens:{model}/evaluation.safetensors",
        "device": setting.device,
        "threads": setting.threads,
        "calibration_dtype": data.dtype,
        "worker_gib": float(2**19),
        **{f"options.{name}": value for name, value in setting.options.items()},
    }
    return prepare(load_config(None, recipe))


def _task(job: Job, kind: str) -> Work:
    """Return the work of the task that was timed under that name."""
    stage = job.plan.waves[0][0]
    name, compressed = kind.removesuffix("_compressed"), kind.endswith("_compressed")
    if name == "load":
        return stage_load_work(job, stage, compressed=compressed)
    if name in ("calibrate", "evaluate"):
        return step_work(job, stage, observe=name == "calibrate", compressed=compressed)
    if kind == "statistics":
        return publish_work(job.shape, job.spec.statistics(job.shape, job.options))
    if kind == "stitch":
        return CALL
    if kind in ("verify", "throughput"):
        return verify_work(job) if kind == "verify" else throughput_work(job)
    # The first site of a stream only looks tokens up.
    index = (
        len(shard_cuts(int(job.options["shards"]), job.num_microbatches)) if kind == "stream" else 0
    )
    return unit_work(job, Unit(name="", kind=kind, index=index, inputs=(), fingerprint=""))


def _sample(seconds: list[float], task: Work) -> Sample:
    spread = 0.1
    if len(seconds) >= MIN_SAMPLES:
        # Around the median, so that a first call, which pays for libraries, counts little.
        middle = statistics.median(seconds)
        logs = sorted(abs(math.log(s / middle)) for s in seconds)
        spread = max(MIN_SPREAD, 1.5 * statistics.median(logs))
    return Sample(seconds=statistics.median(seconds), spread=spread, work=task)
