"""What each command does and prints: tables for people on stderr or stdout, JSON for machines."""

import json
import tempfile
from dataclasses import replace
from typing import Any

from rich.table import Table
from rich.text import Text

from actors import methods as registry
from actors.messages import WorkerSetup
from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet
from orchestrator import artefact, cluster, examine
from orchestrator.api import Started, compress_as, do_prepared
from orchestrator.cluster import ClusterFacts
from orchestrator.config import RunConfig
from orchestrator.consent import ask_before, asker, require_consent
from orchestrator.context import WorkContext
from orchestrator.evaluate import EVALUATION_TOKENS
from orchestrator.evaluate import evaluate as measure
from orchestrator.executors import RayExecutor
from orchestrator.forecast import Forecast, Terms, forecast, forecast_of, parse_cluster
from orchestrator.journal import Journal
from orchestrator.ledger import Ledger
from orchestrator.looks import print_report
from orchestrator.plan_screen import show
from orchestrator.pool import Pool
from orchestrator.prepare import Prepared, prepare, prepare_evaluation
from orchestrator.progress import ProgressScreen
from orchestrator.redo import changed, layers_of, withdraw
from orchestrator.report.numbers import bytes_text, change, decimal, percent, quotient
from orchestrator.report.quality import judged
from orchestrator.report.terminal import TONES
from orchestrator.rundir import finished_report, recipe_of
from orchestrator.subjects import EvaluationPlan, Subject
from orchestrator.sweep import PAGE, exported, points_of
from orchestrator.sweep import sweep as do_sweep
from orchestrator.terminal import Console
from planners.catalogue import CONFIGS
from planners.errors import ConfigError, NumericsError
from planners.plan import to_json

_err = Console(stderr=True)
_out = Console()


def run(
    config: RunConfig,
    terms: Terms,
    *,
    dry_run: bool,
    yes: bool,
    json_: bool,
    **how: Any,
) -> None:
    """Show the plan of a run, do it, showing how it goes on stderr, and print its report."""
    if dry_run:
        prepared = prepare(config, only_plan=True)
        artefact.require_same(prepared)
        _print_prepared(prepared, forecast_of(prepared, terms), json_=json_)
        return
    was_ready = False

    def started(prepared: Prepared) -> Started:
        nonlocal was_ready
        was_ready = finished_report(prepared.run) is not None
        return _started(prepared, terms, yes=yes, is_done=was_ready)

    report = compress_as(config, started, **how)
    if was_ready:
        _err.print("it was READY before; this is its report")
    print_report(report, json_=json_)


def _started(prepared: Prepared, terms: Terms, *, yes: bool, is_done: bool = False) -> Started:
    """Show what a run comes to, and return who asks whether to go on and shows how it goes."""
    found = forecast_of(prepared, terms)
    if is_done:
        title = Text(prepared.title, style="bold")
        _err.print(title, "->", prepared.config.out, soft_wrap=True)
    else:
        show(_err, found, title=prepared.title, out=prepared.config.out)

    def approve(facts: ClusterFacts) -> None:
        require_consent(found, facts, yes=yes, ask=asker())

    return Started(
        listening=ProgressScreen(_err, num_workers=found.num_workers),
        approve=approve,
        expected=found.to_json(),
    )


def plan(config: RunConfig, terms: Terms, *, cluster_text: str | None, json_: bool) -> None:
    """Print the plan of a run; for a model whose weights are not here, from its config alone."""
    if cluster_text is None and config.model not in CONFIGS:
        prepared = prepare(config, only_plan=True)
        artefact.require_same(prepared)
        _print_prepared(prepared, forecast_of(prepared, terms), json_=json_)
        return
    if config.stats:
        raise ConfigError(
            f"stats: {config.stats} is of a model with weights, this plan of a config alone",
            hint="plan with the model's directory and without --cluster, or without --stats",
        )
    devices = parse_cluster(cluster_text) if cluster_text else None
    found = forecast(config, devices, terms)
    where = cluster_text or f"{config.workers} worker" + ("s" if config.workers > 1 else "")
    method = " + ".join(step.method for step in config.chain)
    facts = {"model": config.model, "method": method, "cluster": where}
    title = f"{config.model} · {method} · {where}"
    _print_plan(found, title=title, out="not started", facts=facts, json_=json_)


def _print_prepared(prepared: Prepared, found: Forecast, *, json_: bool) -> None:
    _print_plan(
        found,
        title=prepared.title,
        out=prepared.config.out,
        facts=prepared.facts(),
        json_=json_,
    )


def _print_plan(
    found: Forecast, *, title: str, out: str, facts: dict[str, Any], json_: bool
) -> None:
    if json_:
        document = {
            "identity": to_json(facts),
            "plan": to_json(found.plan),
            "forecast": found.to_json(),
        }
        if found.job.former:
            document["steps"] = [
                {"method": job.spec.name, "plan": to_json(job.plan)} for job in found.steps
            ]
        print(json.dumps(document))  # noqa: T201 the one document
        return
    show(_out, found, title=title, out=out)


def evaluate(config: RunConfig, *, json_: bool) -> None:
    """Measure the perplexity of one checkpoint and print it."""
    prepared = prepare_evaluation(config)
    plan_, subject, ids = prepared.plan, prepared.subject, prepared.ids
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        run_ = Directory(folder)
        run_.write(EVALUATION_TOKENS, tokens_to_parquet(ids, {"source": prepared.source}))
        with (
            ProgressScreen(_err, num_workers=config.workers) as listener,
            cluster.connected(
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
    if json_:
        print(json.dumps(found))  # noqa: T201 the one document
    else:
        _out.print(
            Text.assemble("perplexity ", (decimal(loss.perplexity), "bold")),
            f"over {loss.num_tokens:,} predicted tokens in sequences of {ids.shape[1]}, "
            f"source {prepared.source}",
        )


def sweep(
    run_uri: str,
    *,
    names: list[str],
    fractions: list[float],
    options: dict[str, str],
    placement: dict[str, Any],
    json_: bool,
) -> None:
    """Do a sweep and print its table."""
    config = recipe_of(Directory(run_uri))
    base = prepare(config.model_copy(update=placement))
    points = points_of(base, names, fractions, options)
    with ProgressScreen(_err, num_workers=base.plan.num_workers) as listener:
        found = do_sweep(base, points, listener=listener)
    if json_:
        print(json.dumps(found))  # noqa: T201 the one document
        return
    dense = found["dense"]["perplexity"]
    title = f"{found['model']}: dense perplexity {decimal(dense)}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("point", "kept", "predicted error", "perplexity", "over dense", "quality", ""):
        table.add_column(column, justify="left" if column in ("point", "quality", "") else "right")
    for point in found["points"]:
        read = judged(
            dense, point["perplexity"], kept=point["keep_fraction"],
            parameters=found["dense"]["parameters"], names=[point["method"]],
        )  # fmt: skip
        table.add_row(
            point["name"],
            percent(point["keep_fraction"]),
            percent(point["predicted_error"]),
            decimal(point["perplexity"]),
            change(quotient(point["perplexity"], dense)),
            Text(read.word, style=TONES[read.tone]),
            "front" if point["on_front"] else "",
        )
    _out.print(table)
    _out.print(f"{run_uri}/{PAGE}; compress-cluster export {run_uri} --point NAME", soft_wrap=True)


def export(run_uri: str, point: str, terms: Terms, *, yes: bool, json_: bool) -> None:
    """Finish one point of a sweep and print its report."""
    prepared = exported(prepare(recipe_of(Directory(run_uri))), point)
    is_done = finished_report(prepared.run) is not None

    def started(prepared: Prepared) -> Started:
        return _started(prepared, terms, yes=yes, is_done=is_done)

    print_report(do_prepared(prepared, started), json_=json_)


def redo(  # noqa: PLR0913 -- what the command is given
    run_uri: str,
    terms: Terms,
    *,
    layers: str,
    options: dict[str, str],
    placement: dict[str, Any],
    yes: bool,
    json_: bool,
) -> None:
    """Make some layers of a run again and print the new report."""
    wanted = layers_of(layers)
    config = recipe_of(Directory(run_uri)).model_copy(update=placement)
    new = changed(config, wanted, options)
    said = _started(new, terms, yes=yes)
    _err.print(f"of this only layers {layers}, and what needs them or they need, is done again")
    ask_before(config.address, said.approve)  # before READY is taken away
    withdraw(new, wanted)
    print_report(do_prepared(new, lambda _: replace(said, approve=lambda _: None)), json_=json_)


def verify(directory: str, *, model_store: str, json_: bool) -> None:
    """Print what was checked of a run or a model.

    Raises:
        NumericsError: a check did not hold.
    """
    checks = examine.verify(directory, model_store=model_store)
    failed = [check["name"] for check in checks if not check["passed"]]
    if json_:
        print(json.dumps({"directory": directory, "passed": not failed, "checks": checks}))  # noqa: T201 the one document
    else:
        table = Table(title=directory, title_justify="left", show_header=False)
        for check in checks:
            held = check["passed"]
            mark = Text("held" if held else "failed", style="green" if held else "red")
            table.add_row(mark, check["name"], check["detail"])
        _out.print(table)
    if failed:
        raise NumericsError(f"{directory}: {', '.join(failed)}: did not hold")


def statistics(action: str, run_uri: str, *, json_: bool) -> None:
    """List, show or verify the statistics that a run kept."""
    run_ = Directory(run_uri)
    if action == "ls":
        rows = artefact.listed(run_)
        if json_:
            print(json.dumps({"run": run_uri, "layers": rows}))  # noqa: T201 the one document
            return
        table = Table(title=run_uri, title_justify="left")
        for column in ("layer", "tokens", "bytes", "taps"):
            table.add_column(column, justify="left" if column == "taps" else "right")
        for row in rows:
            table.add_row(
                str(row["layer"]), f"{row['num_tokens']:,}", bytes_text(row["bytes"]),
                ", ".join(row["taps"]),
            )  # fmt: skip
        _out.print(table)
        return
    found = artefact.shown(run_) if action == "show" else artefact.verified(run_)
    if json_:
        print(json.dumps(found))  # noqa: T201 the one document
    elif action == "show":
        table = Table(title=run_uri, title_justify="left", show_header=False)
        for key, value in found.items():
            text = ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(key.replace("_", " "), text)
        _out.print(table)
    else:
        _out.print(
            f"{found['files']} files of {found['layers']} layers, {bytes_text(found['bytes'])}: as "
            "recorded; every sum finite, every gram symmetric",
            soft_wrap=True,
        )


def methods(*, json_: bool) -> None:
    """Print every method with its options and defaults."""
    specs = [registry.spec(name) for name in registry.available()]
    if json_:
        plain = [
            {"name": s.name, "source": s.source, "modules": s.modules, "options": s.options}
            for s in specs
        ]
        print(json.dumps(to_json(plain)))  # noqa: T201 the one document
        return
    for spec in specs:
        _out.print(
            Text(spec.name, style="bold"), f"{spec.source}, shrinks {', '.join(spec.modules)}"
        )
        table = Table(box=None, show_header=False, padding=(0, 2))
        for option in spec.options:
            words = option.help
            if option.choices:
                words += f" (one of: {', '.join(_word(c) for c in option.choices)})"
            table.add_row(f"{option.name}={_word(option.default)}", words)
        _out.print(table)
    _out.print("set one with --option KEY=VALUE; shown are the defaults")


def _measure(run_: Directory, plan_: EvaluationPlan, subject: Subject, listener: Any) -> Any:
    journal = Journal(run_, listener)
    setup = WorkerSetup(name="pattern", incarnation="", threads=plan_.threads, device=plan_.device)
    workers = plan_.num_workers
    pool = Pool(RayExecutor(), setup, num_workers=workers, journal=journal)
    try:
        context = WorkContext(run=run_, ledger=Ledger(run_), journal=journal, pool=pool)
        return measure(context, plan_, subject)
    finally:
        pool.close()


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
