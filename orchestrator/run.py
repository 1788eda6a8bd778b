"""The path of a run, from start to report."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from actors.storage.files import Directory
from actors.storage.records import require_directory
from orchestrator.backend import metrics, preemption, ray_cluster
from orchestrator.backend.executor import Executor
from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.engine.failure_policy import POLICIES
from orchestrator.engine.interrupt import Interruption, interruptible
from orchestrator.phases.allocate import allocate
from orchestrator.phases.calibrate import tell_missing
from orchestrator.phases.context import RunContext, new_evaluator, new_pool
from orchestrator.phases.earlier_steps import finish_steps, run_earlier_steps
from orchestrator.phases.evaluate import Loss, evaluate, evaluation_plan, settled
from orchestrator.phases.finish import finish
from orchestrator.phases.open_run import check_run, write_run
from orchestrator.phases.outcome import outcome
from orchestrator.phases.repair import repair_result, skip_unneeded, verify_bytes
from orchestrator.phases.shrink import shrink
from orchestrator.phases.stitch import stitched
from orchestrator.phases.throughput import throughput
from orchestrator.phases.times import measure_times
from orchestrator.phases.verify import verify
from orchestrator.prepare.prepared import Prepared, dense_subject
from orchestrator.rundir import lease
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import Journal, Listener
from orchestrator.rundir.ledger import Ledger
from planners.memory.placement import shared_bytes


def run(
    prepared: Prepared,
    *,
    listener: Listener,
    connect: Callable[..., AbstractContextManager[ClusterFacts]] = ray_cluster.connected,
    verify_hashes: bool = False,
    approve: Callable[[ClusterFacts], None] = lambda _: None,
    expected: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run or resume a prepared run on a Ray cluster, and return its report.

    Args:
        prepared: the run.
        listener: is called with every event.
        connect: `ray_cluster.connected`, or the same with further arguments.
        verify_hashes: compare the bytes of all files with their records first, not only sizes.
        approve: gets the cluster's facts before any work starts, and may refuse by raising.
        expected: the forecast, for the report to compare with.

    Raises:
        CompressionError: see `planners.errors`; finished work is kept.
    """
    config = prepared.config
    prepared = replace(prepared, expected=dict(expected or {}))
    require_directory(prepared.run)
    with lease.held(prepared.run) as hold:
        known = check_run(prepared)
        report = finished_report(prepared.run, hashes=verify_hashes) if known else None
        if report is not None:
            return report
        with connect(
            config.address,
            num_cpus=config.workers * config.threads,
            num_gpus=config.workers if config.device == "cuda" else 0,
            store_bytes=config.workers * shared_bytes(prepared.plan.waves[0]),
        ) as facts:
            approve(facts)
            write_run(
                prepared, known=known
            )  # not before: a failed first attempt to connect leaves no files
            with interruptible() as interruption, preemption.watchers(config.address) as watchers:
                return run_on(
                    prepared,
                    RayExecutor(watchers=watchers, early=facts.early),
                    listener=metrics.metered(
                        listener,
                        reasons=POLICIES,
                        price_per_hour=prepared.expected.get("price_per_hour") or 0.0,
                    ),
                    verify_hashes=verify_hashes,
                    fence=hold.require,
                    interruption=interruption,
                )


def run_on(
    prepared: Prepared,
    executor: Executor,
    *,
    listener: Listener,
    verify_hashes: bool = False,
    fence: Callable[[], None] | None = None,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Run an opened run on an executor; every phase skips the units that have a record.

    ``fence`` is called before each record and before READY; it raises if another driver has taken
    over. ``interruption`` is what Ctrl-C sets, if its handler is installed.
    """
    run = prepared.run
    journal = Journal(run, listener)
    pool, evaluator = new_pool(prepared, executor, journal), new_evaluator(prepared, executor)
    pool.interruption = interruption or pool.interruption
    # Of several steps only the first reuses another run's statistics; all use its dense losses.
    known = prepared.statistics_uri or prepared.config.stats
    reuse = Directory(known) if known else None
    context = RunContext(
        prepared=prepared,
        form=prepared.plan.form,
        run=run,
        ledger=Ledger(run, reuse=reuse, verify_hashes=verify_hashes, fence=fence),
        journal=journal,
        pool=pool,
    )
    try:
        with context.phase("run", total=0, begun=prepared.begun):
            tell_missing(context, context.prepared.statistics_uri)
            if prepared.config.address == "local" and not context.ledger.has_record("throughput"):
                evaluator.start()  # it imports what it needs while the units run
            context, losses = compress_and_evaluate(context)
            pool.close()  # frees memory: what follows loads whole models
            checks = verify(context, stitched(context), evaluator)
            models = [dense_subject(context.prepared), stitched(context)]
            speeds = throughput(context, models, evaluator)
            evaluator.close()
            verify_bytes(context)
    finally:
        evaluator.close()
        pool.close()
        journal.flush()
    report = outcome(context, losses=losses, throughput=speeds, checks=checks)
    if fence is not None:
        fence()
    finish(context, report)
    return report


def compress_and_evaluate(context: RunContext) -> tuple[RunContext, dict[str, Loss]]:
    """Return the context with its final widths, and the losses of both models."""
    context = measure_times(run_earlier_steps(context))
    measuring = evaluation_plan(context.prepared)
    losses: dict[str, Loss] = {}

    def measure_and_allocate(calibrated: RunContext) -> RunContext:
        nonlocal measuring
        dense = dense_subject(calibrated.prepared)
        measuring = settled(calibrated, measuring, dense)
        losses["dense"] = evaluate(calibrated, measuring, dense)
        return allocate(calibrated)

    skip_unneeded(context)
    context = shrink(context, choose_widths=measure_and_allocate)
    repair_result(context)
    finish_steps(context)
    losses["compressed"] = evaluate(context, measuring, stitched(context))
    return context, losses
