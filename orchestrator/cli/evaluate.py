"""Print perplexity, checks and speeds of existing models."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
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
from orchestrator.report import speed
from orchestrator.report.numbers import bytes_text, decimal
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.layout import EVALUATION_TOKENS
from orchestrator.rundir.ledger import Ledger
from planners.errors import NumericsError

COLUMNS = ("batch", "mode", "prefill\ntok/s", "", "decode\ntok/s", "", "memory")
_STYLES = {speed.FASTER: "green", speed.SLOWER: "yellow", speed.NOISE: "dim"}


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
    models = inspect.bench(
        directories,
        setup=WorkerSetup(name="pattern", incarnation="", threads=threads, device=chosen),
        workers=Workers(number=workers, bytes=int(memory * GIB)),
        **how,
    )
    document = {"models": models, "comparisons": _comparisons(models)}
    title = f"prompt {how['prompt']}, {how['new_tokens']} new, on {chosen}"
    emit(document, lambda: _print_rates(title, models), json_=json_)


def _comparisons(models: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    first, *others = models
    return {
        uri: [asdict(each) for each in speed.compared(models[first], models[uri])] for uri in others
    }


def _print_rates(title: str, models: Mapping[str, dict[str, Any]]) -> None:
    first, *others = models
    for uri in others:
        slower = speed.headline(speed.compared(models[first], models[uri]))
        if slower:
            stdout.print(Text(f"{uri}: {slower.replace('the dense model', first)}", style="yellow"))
    stdout.print(title)
    for uri, found in models.items():
        compared = {} if uri == first else _by_setting(speed.compared(models[first], found))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in COLUMNS if compared else [c for c in COLUMNS if c]:
            table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
        for row in found["settings"]:
            table.add_row(*_cells(row, compared))
        stdout.print(Text(f"\n{uri}", style="bold"), soft_wrap=True)
        stdout.print(table)
    stdout.print()
    for line in _remarks(models):
        stdout.print(Text(line), soft_wrap=True)


def _by_setting(found: Sequence[speed.Speed]) -> dict[tuple[int, str, str], speed.Speed]:
    return {(each.batch, each.mode, each.part): each for each in found}


def _cells(row: Mapping[str, Any], compared: Mapping[Any, speed.Speed]) -> list[str | Text]:
    cells: list[str | Text] = [str(row["batch"]), row["mode"]]
    for part in speed.PARTS:
        rate = row.get(f"{part}_tokens_per_second")
        cells.append("-" if rate is None else f"{rate:,.0f}")
        each = compared.get((row["batch"], row["mode"], part))
        if each:
            cells.append(Text(each.said, style=_STYLES[each.verdict]))
        elif compared:
            cells.append("")
    stages, memory = row.get("stages", 1), bytes_text(row.get("peak_bytes"))
    return [*cells, memory if stages == 1 else f"{memory} in {stages} workers"]


def _remarks(models: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield what was not measured, the kernels, and why a model is slower than the first."""
    first = next(iter(models))
    for uri, found in models.items():
        for row in found["settings"]:
            if "not_measured" in row:
                said = f"{uri}, batch {row['batch']}, {row['mode']}: not measured"
                yield f"{said}: {row['not_measured']}"
        if any("cannot hold it" in row.get("not_measured", "") for row in found["settings"]):
            yield "use more --workers, or --worker-gib"
        kernels = speed.kernels_text(found)
        if kernels:
            yield f"{uri}: attention kernels: {kernels}"
        warnings = [*speed.refused_kernels(models[first], found), *speed.uneven_widths(found)]
        because = speed.reasons(speed.compared(models[first], found), models[first], found)
        yield from (f"{uri}: warning: {each}" for each in warnings if each not in because)
        yield from (f"{uri}: why it is slower: {each}" for each in because)


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
