"""What `compress-cluster batch` prints: what it comes to, how each run goes, then the table."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from orchestrator.batch import Batch, Entry, Row, do_batch, read_batch, table_of, waiting
from orchestrator.cluster import ClusterFacts
from orchestrator.consent import ask_before, asker, require_consent
from orchestrator.forecast import Forecast, Terms, forecast_of
from orchestrator.journal import Event
from orchestrator.plan_screen import duration
from orchestrator.progress import ProgressScreen
from orchestrator.terminal import Console
from planners.errors import ClusterError, CompressionError

MAX_FORECASTS = 50  # runs; each takes up to a second
COLOURS = {"READY": "green", "failed": "red", "waiting": "yellow"}
_err = Console(stderr=True)
_out = Console()


def batch(path: str, *, dry_run: bool, yes: bool, json_: bool) -> None:
    """Do a batch and print its table.

    Raises:
        ClusterError: the budget is spent and runs are left.
        CompressionError: a run failed.
    """
    found = read_batch(path)
    forecasts = _forecasts(found)
    found.expected = {name: each.to_json() for name, each in forecasts.items()}
    if dry_run:
        _print(found, table_of(found), json_=json_)
        return
    if forecasts:
        _err.print(_expected(found), soft_wrap=True)
        # Whoever says how much money may be spent has answered.
        _require_consent(found, forecasts, yes=yes or found.budget.money is not None)
    screen: list[ProgressScreen] = []

    def close() -> None:
        while screen:
            screen.pop().__exit__()

    def on_run(entry: Entry) -> None:
        close()
        _err.print(Text(entry.name, style="bold"), "->", entry.prepared.config.out, soft_wrap=True)
        workers = entry.prepared.plan.num_workers
        screen.append(ProgressScreen(_err, num_workers=workers).__enter__())

    def listener(event: Event) -> None:
        screen[0](event)

    try:
        rows = do_batch(found, listener=listener, on_run=on_run)
    finally:
        close()
    _print(found, rows, json_=json_)
    _require_done(rows)


def _require_done(rows: Sequence[Row]) -> None:
    failed = [row for row in rows if row.state == "failed"]
    left = [row for row in rows if row.state == "waiting"]
    if failed:
        raise CompressionError(
            f"{len(failed)} of {len(rows)} runs failed: {failed[0].name}: {failed[0].error}",
            hint="the others are done; the same command tries those that failed again",
        )
    if left:
        raise ClusterError(
            f"the budget is spent; {len(left)} of {len(rows)} runs are left",
            hint="raise the budget in the file; the same command goes on",
        )


def _forecasts(found: Batch) -> dict[str, Forecast]:
    """Return what each run that is left comes to: the first of each model and text calibrates."""
    left = waiting(found)[:MAX_FORECASTS]
    terms = Terms(price_per_hour=found.budget.price_per_worker_hour or None)
    begun = {e.calibration for e in found.entries if e.prepared.run.names("stats")}
    forecasts = {}
    for entry in left:
        calibrated = entry.calibration in begun and not entry.prepared.former
        forecasts[entry.name] = forecast_of(entry.prepared, terms, calibrated=calibrated)
        begun.add(entry.calibration)
    return forecasts


def _expected(found: Batch) -> str:
    """Return what the runs that are left may take and cost, in a line."""
    left, outlooks = waiting(found), list(found.expected.values())
    known = [each for each in outlooks if each.get("seconds")]
    if len(known) < len(left):
        return f"{len(left)} runs are left; how long all of them take is not known"
    said = f"{len(left)} runs are left: about {duration(sum(e['seconds']['p50'] for e in known))}"
    money = [each["money"]["p50"] for each in known if each.get("money")]
    return said + (f", about {sum(money):,.2f} of money" if money else "")


def _require_consent(found: Batch, forecasts: dict[str, Forecast], *, yes: bool) -> None:
    """Ask once for all runs, at each cluster that they are to go to."""
    entries = {e.prepared.config.address: e for e in found.entries if e.name in forecasts}
    for address, entry in entries.items():
        forecast = forecasts[entry.name]

        def approve(facts: ClusterFacts, forecast: Forecast = forecast) -> None:
            require_consent(forecast, facts, yes=yes, ask=asker(), cost=_expected(found))

        ask_before(address, approve)


def _print(found: Batch, rows: Sequence[Row], *, json_: bool) -> None:
    if json_:
        runs = [{**asdict(row), "expected": found.expected.get(row.name)} for row in rows]
        document = {"out": found.out, "spent": asdict(found.spent), "runs": runs}
        print(json.dumps(document))  # noqa: T201 the one document
        return
    table = Table(title=found.out, title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for column in ("kept", "perplexity", "over dense", "planned", "took"):
        table.add_column(column, justify="right")
    table.add_column("calibration", overflow="fold")
    for row in rows:
        done = row.state == "READY"
        table.add_row(
            row.name,
            Text(row.state, style=COLOURS[row.state]),
            f"{row.keep_fraction:.4f}" if done else "",
            f"{row.perplexity:.4g}" if done else "",
            f"{row.perplexity / row.dense_perplexity - 1:+.1%}" if done else "",
            _planned(found, row),
            f"{row.seconds:,.0f} s" if done else "",
            row.calibration,
        )
    _out.print(table)
    for row in rows:
        if row.error:
            _out.print(f"{row.name}: {row.error}", soft_wrap=True)
    if waiting(found):
        _out.print(_expected(found))
    _out.print(_spent(found))


def _planned(found: Batch, row: Row) -> str:
    seconds = (found.expected.get(row.name) or {}).get("seconds")
    return duration(seconds["p50"]) if seconds else ""


def _spent(found: Batch) -> str:
    spent, budget = found.spent, found.budget
    said = f"{spent.seconds / 3600:.2f} hours"
    if budget.hours is not None:
        said += f" of {budget.hours:g}"
    if budget.price_per_worker_hour:
        money = spent.worker_seconds / 3600 * budget.price_per_worker_hour
        said += f", {money:.2f} of money" + (f" of {budget.money:g}" if budget.money else "")
    return f"used: {said}"
