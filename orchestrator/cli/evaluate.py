"""Print perplexity, checks and speeds of existing models."""

import tempfile
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from actors.messages import WorkerSetup
from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet
from orchestrator.backend import ray_cluster
from orchestrator.backend.ray_executor import RayExecutor
from orchestrator.cli.output import emit, stderr, stdout
from orchestrator.cli.progress import ProgressScreen
from orchestrator.engine.work_context import WorkContext
from orchestrator.engine.worker_pool import Pool
from orchestrator.experiments import inspect
from orchestrator.phases.evaluate import evaluate as measured_loss
from orchestrator.phases.evaluate import settled
from orchestrator.phases.throughput import Workers
from orchestrator.prepare.evaluation_plan import EvaluationPlan, Subject
from orchestrator.prepare.machine import GIB, chosen_device, usable_gib
from orchestrator.prepare.standalone_evaluation import prepare_evaluation
from orchestrator.recipe.config import RunConfig
from orchestrator.report.numbers import bytes_text, decimal
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.layout import EVALUATION_TOKENS
from orchestrator.rundir.ledger import Ledger
from planners.errors import NumericsError

NUMBERS = ("batch", "workers", "prefill tok/s", "decode tok/s", "peak memory")


def bench(
    directories: Sequence[str],
    *,
    device: str,
    threads: int,
    workers: int,
    worker_gib: float | None,
    json_: bool,
    **how: Any,
) -> None:
    """Print prefill and decode rates of several models side by side."""
    chosen = chosen_device(device, "local")
    memory = worker_gib or usable_gib(chosen, workers)
    rows = inspect.bench(
        directories,
        setup=WorkerSetup(name="pattern", incarnation="", threads=threads, device=chosen),
        workers=Workers(number=workers, bytes=int(memory * GIB)),
        **how,
    )
    title = f"prompt {how['prompt']}, {how['new_tokens']} new"
    emit({"rows": rows}, lambda: _print_rates(title, rows), json_=json_)


def _print_rates(title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in ("model", *NUMBERS):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(row["model"], str(row["batch"]), *_numbers(row))
    stdout.print(table)
    for row in rows:
        if "not_measured" in row:
            said = f"{row['model']}, batch {row['batch']}: not measured: {row['not_measured']}; "
            stdout.print(said + "use more --workers, or --worker-gib", soft_wrap=True)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    if "not_measured" in row:
        return ("-",) * (len(NUMBERS) - 1)
    return (
        str(row.get("stages", 1)),
        f"{row['prefill_tokens_per_second']:,.0f}",
        f"{row['decode_tokens_per_second']:,.0f}",
        bytes_text(row["peak_bytes"]),
    )


def evaluate(config: RunConfig, *, json_: bool) -> None:
    """Measure the perplexity of one checkpoint and print it."""
    prepared = prepare_evaluation(config)
    plan_, subject, ids = prepared.plan, prepared.subject, prepared.ids
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        run_ = Directory(folder)
        run_.write(EVALUATION_TOKENS, tokens_to_parquet(ids, {"source": prepared.source}))
        with (
            ProgressScreen(stderr, num_workers=config.workers) as listener,
            ray_cluster.connected(
                config.address,
                num_cpus=config.workers * config.threads,
                num_gpus=config.workers if plan_.device == "cuda" else 0,
                store_bytes=0,
            ),
        ):
            loss = _measure(run_, plan_, subject, listener)
    found = {
        "model": subject.uri,
        "evaluation": {
            "source": prepared.source,
            "sequence_length": int(ids.shape[1]),
            "num_tokens": loss.num_tokens,
            "perplexity": loss.perplexity,
        },
    }
    head = Text.assemble("perplexity ", (decimal(loss.perplexity), "bold"))
    said = f"over {loss.num_tokens:,} predicted tokens in sequences of {ids.shape[1]}, "
    emit(found, lambda: stdout.print(head, f"{said}source {prepared.source}"), json_=json_)


def verify(directory: str, *, model_store: str, json_: bool) -> None:
    """Print the checks of a run or a model.

    Raises:
        NumericsError: a check failed.
    """
    checks = inspect.verify(directory, model_store=model_store)
    failed = [check["name"] for check in checks if not check["passed"]]
    table = Table(title=directory, title_justify="left", show_header=False)
    for check in checks:
        held = check["passed"]
        mark = Text("passed" if held else "failed", style="green" if held else "red")
        table.add_row(mark, check["name"], check["detail"])
    document = {"directory": directory, "passed": not failed, "checks": checks}
    emit(document, lambda: stdout.print(table), json_=json_)
    if failed:
        raise NumericsError(f"{directory}: failed checks: {', '.join(failed)}")


def _measure(run_: Directory, plan_: EvaluationPlan, subject: Subject, listener: Any) -> Any:
    journal = Journal(run_, listener)
    setup = WorkerSetup(name="pattern", incarnation="", threads=plan_.threads, device=plan_.device)
    workers = plan_.num_workers
    pool = Pool(RayExecutor(), setup, num_workers=workers, journal=journal)
    try:
        context = WorkContext(run=run_, ledger=Ledger(run_), journal=journal, pool=pool)
        return measured_loss(context, settled(context, plan_, subject), subject)
    finally:
        pool.close()
