"""Run a recipe, print its plan, or recompute layers of a run, and print the report."""

import time
from dataclasses import replace
from typing import Any

from rich.text import Text

from actors.storage.files import Directory
from orchestrator.api import RunHooks, compress_as, do_prepared
from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.cli import clock
from orchestrator.cli.consent import ask_before, asker, require_consent
from orchestrator.cli.output import emit, stderr, stdout
from orchestrator.cli.plan import show
from orchestrator.cli.progress import ProgressScreen
from orchestrator.cli.status import print_report
from orchestrator.experiments.redo import changed, layers_of, withdraw
from orchestrator.forecast.forecast import Forecast, forecast, forecast_of
from orchestrator.forecast.pricing import Pricing, parse_cluster
from orchestrator.phases import open_run
from orchestrator.phases.open_run import recipe_of
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import RunConfig
from orchestrator.report.numbers import seconds_text
from orchestrator.rundir.finished import finished_report
from planners.canonical_json import to_json
from planners.catalogue import CONFIGS
from planners.errors import ConfigError


def run(
    config: RunConfig,
    terms: Pricing,
    *,
    yes: bool,
    json_: bool,
    **how: Any,
) -> None:
    """Show the plan of a run, do the run with progress on stderr, and print its report."""
    was_ready = False

    def started(prepared: Prepared) -> RunHooks:
        nonlocal was_ready
        was_ready = finished_report(prepared.run) is not None
        return started_run(prepared, terms, yes=yes, is_done=was_ready)

    report = compress_as(config, started, **how)
    if was_ready:
        stderr.print("the run was already READY; this is its report")
    print_report(report, json_=json_)
    if not json_ and not was_ready:
        stdout.print(took(report))


def took(report: dict[str, Any]) -> str:
    """Return how long this command took until now, and all commands of the run together."""
    seconds = time.time() - clock.began()
    total = report["seconds"]["total"]
    # The total ends before the report is written; of one command it is less than it took.
    earlier = f"; {seconds_text(total)} in total, with those before" if total > seconds else ""
    return f"took {seconds_text(seconds)}{earlier}"


def started_run(
    prepared: Prepared, terms: Pricing, *, yes: bool, is_done: bool = False
) -> RunHooks:
    """Show the forecast of a run; return the hooks that ask for consent and show progress."""
    found = forecast_of(prepared, terms)
    if is_done:
        title = Text(prepared.title, style="bold")
        stderr.print(title, "->", prepared.config.out, soft_wrap=True)
    else:
        show(stderr, found, title=prepared.title, out=prepared.config.out)

    def approve(facts: ClusterFacts) -> None:
        require_consent(found, facts, yes=yes, ask=asker())

    return RunHooks(
        listening=ProgressScreen(stderr, num_workers=found.num_workers),
        approve=approve,
        expected=found.to_json(),
        begun=clock.began(),
    )


def plan(config: RunConfig, terms: Pricing, *, cluster_text: str | None, json_: bool) -> None:
    """Print the plan of a run; without weights on this machine, from the config only."""
    if cluster_text is None and config.model not in CONFIGS:
        show_plan(config, terms, json_=json_)
        return
    if config.stats:
        raise ConfigError(
            f"stats: {config.stats} needs a model with weights; this plan uses only a config",
            hint="plan with the model's directory and without --cluster, or without --stats",
        )
    devices = parse_cluster(cluster_text) if cluster_text else None
    found = forecast(config, devices, terms)
    where = cluster_text or f"{config.workers} worker" + ("s" if config.workers > 1 else "")
    method = " + ".join(step.method for step in config.chain)
    facts = {"model": config.model, "method": method, "cluster": where}
    title = f"{config.model} · {method} · {where}"
    _print_plan(found, title=title, out="not started", facts=facts, json_=json_)


def show_plan(config: RunConfig, terms: Pricing, *, json_: bool) -> None:
    """Print the plan of a run of a model that is at hand."""
    prepared = prepare(config, only_plan=True)
    open_run.require_same(prepared)
    _print_prepared(prepared, forecast_of(prepared, terms), json_=json_)


def _print_prepared(prepared: Prepared, found: Forecast, *, json_: bool) -> None:
    _print_plan(
        found,
        title=prepared.title,
        out=prepared.config.out,
        facts=prepared.facts,
        json_=json_,
    )


def _print_plan(
    found: Forecast, *, title: str, out: str, facts: dict[str, Any], json_: bool
) -> None:
    document = {
        "identity": to_json(facts),
        "plan": to_json(found.plan),
        "forecast": found.to_json(),
    }
    if found.job.former:
        document["steps"] = [
            {"method": job.spec.name, "plan": to_json(job.plan)} for job in found.steps
        ]
    emit(document, lambda: show(stdout, found, title=title, out=out), json_=json_)


def redo(  # noqa: PLR0913 -- what the command is given
    run_uri: str,
    terms: Pricing,
    *,
    layers: str,
    options: dict[str, str],
    placement: dict[str, Any],
    yes: bool,
    json_: bool,
) -> None:
    """Recompute some layers of a run and print the new report."""
    wanted = layers_of(layers)
    config = recipe_of(Directory(run_uri)).model_copy(update=placement)
    new = changed(config, wanted, options)
    said = started_run(new, terms, yes=yes)
    stderr.print(f"only layers {layers}, what they need and what depends on them are recomputed")
    ask_before(config.address, said.approve)  # before READY is removed
    withdraw(new, wanted)
    print_report(do_prepared(new, lambda _: replace(said, approve=lambda _: None)), json_=json_)
