"""Print batches and sweeps: the forecast, the progress of each run, then the table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from actors.storage.files import Directory
from orchestrator.api import RunHooks, do_prepared
from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.cli.consent import ask_before, asker, require_consent
from orchestrator.cli.output import emit, stderr, stdout
from orchestrator.cli.progress import ProgressScreen
from orchestrator.cli.run import started_run
from orchestrator.cli.status import print_report
from orchestrator.experiments.batch import Row, do_batch, table_of, waiting
from orchestrator.experiments.batch_file import Batch, Entry, read_batch
from orchestrator.experiments.sweep import PAGE, Wanted, exported, points_of
from orchestrator.experiments.sweep import sweep as do_sweep
from orchestrator.forecast.forecast import Forecast, forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.phases.open_run import recipe_of
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.report.numbers import (
    bytes_text,
    change,
    decimal,
    percent,
    quotient,
    seconds_text,
)
from orchestrator.report.quality import judged
from orchestrator.report.terminal import TONES
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.journal import Event
from planners.errors import ClusterError, CompressionError

WIDEST = 1000  # columns of a terminal
MAX_FORECASTS = 50  # runs; each takes up to a second
Shown = tuple[str, Text, Mapping[str, Text]]  # name of a result, its state, what is known of it
COLOURS = {"READY": "green", "failed": "red", "waiting": "yellow"}


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
        stderr.print(_expected(found), soft_wrap=True)
        # A budget in money is the consent.
        _require_consent(found, forecasts, yes=yes or found.budget.money is not None)
    screen: list[ProgressScreen] = []

    def close() -> None:
        while screen:
            screen.pop().__exit__()

    def on_run(entry: Entry) -> None:
        close()
        stderr.print(
            Text(entry.name, style="bold"), "->", entry.prepared.config.out, soft_wrap=True
        )
        workers = entry.prepared.plan.num_workers
        screen.append(ProgressScreen(stderr, num_workers=workers).__enter__())

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
            hint="the others are done; the same command retries those that failed",
        )
    if left:
        raise ClusterError(
            f"the budget is spent; {len(left)} of {len(rows)} runs are left",
            hint="raise the budget in the file; the same command resumes the batch",
        )


def _forecasts(found: Batch) -> dict[str, Forecast]:
    """Return the forecast of each remaining run: the first of each model and data calibrates."""
    left = waiting(found)[:MAX_FORECASTS]
    terms = Pricing(price_per_hour=found.budget.price_per_worker_hour or None)
    begun = {e.calibration for e in found.entries if e.prepared.run.names("stats")}
    forecasts = {}
    for entry in left:
        calibrated = entry.calibration in begun and not entry.prepared.former
        forecasts[entry.name] = forecast_of(entry.prepared, terms, calibrated=calibrated)
        begun.add(entry.calibration)
    return forecasts


def _expected(found: Batch) -> str:
    """Return one line on the time and cost of the remaining runs."""
    left, outlooks = waiting(found), list(found.expected.values())
    known = [each for each in outlooks if each.get("seconds")]
    if len(known) < len(left):
        return f"{len(left)} runs are left; their total time is unknown"
    seconds = sum(each["seconds"]["p50"] for each in known)
    said = f"{len(left)} runs are left: about {seconds_text(seconds)}"
    money = [each["money"]["p50"] for each in known if each.get("money")]
    return said + (f", cost about {sum(money):,.2f}" if money else "")


def _require_consent(found: Batch, forecasts: dict[str, Forecast], *, yes: bool) -> None:
    """Ask once for all runs, at each cluster that they use."""
    entries = {e.prepared.config.address: e for e in found.entries if e.name in forecasts}
    for address, entry in entries.items():
        forecast = forecasts[entry.name]

        def approve(facts: ClusterFacts, forecast: Forecast = forecast) -> None:
            require_consent(forecast, facts, yes=yes, ask=asker(), cost=_expected(found))

        ask_before(address, approve)


def _print(found: Batch, rows: Sequence[Row], *, json_: bool) -> None:
    runs = [{**asdict(row), "expected": found.expected.get(row.name)} for row in rows]
    document = {"out": found.out, "spent": asdict(found.spent), "runs": runs}
    emit(document, lambda: _print_batch(found, rows), json_=json_)


def _print_batch(found: Batch, rows: Sequence[Row]) -> None:
    stdout.print(found.out, style="bold", soft_wrap=True)
    states = [Text(row.state, style=COLOURS[row.state]) for row in rows]
    stdout.print(_shown(("run", "state"), [
        (row.name, state, _facts(found, row)) for row, state in zip(rows, states, strict=True)
    ]))  # fmt: skip
    for row in rows:
        if row.error:
            stdout.print(f"{row.name}: {row.error}", soft_wrap=True)
    if waiting(found):
        stdout.print(_expected(found))
    stdout.print(_spent(found))


def _facts(found: Batch, row: Row) -> dict[str, Text]:
    """Return column -> text for a run; unknown columns are absent."""
    seconds = (found.expected.get(row.name) or {}).get("seconds")
    facts = {"planned": Text(seconds_text(seconds["p50"]))} if seconds else {}
    if row.state == "READY":
        read = Text(row.quality, style=TONES[row.tone])
        facts = _measured(row.keep_fraction, row.perplexity, row.dense_perplexity, read)
        facts["took"] = Text(seconds_text(row.seconds))
    return facts | ({"calibration": Text(row.calibration)} if row.calibration else {})


def _measured(kept: float, perplexity: float, dense: float, quality: Text) -> dict[str, Text]:
    return {
        "kept": Text(percent(kept)),
        "perplexity": Text(decimal(perplexity)),
        "over dense": Text(change(quotient(perplexity, dense))),
        "quality": quality,
    }


def _shown(heads: tuple[str, str], rows: Sequence[Shown]) -> Table:
    """Return a table of results; on a terminal too narrow for it, a list with one block each."""
    columns = list(dict.fromkeys(name for *_, facts in rows for name in facts))
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for name in (*heads, *columns):
        left = name in (*heads, "quality", "calibration")
        # A quality is words, which may take two lines.
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "quality")
    for name, state, facts in rows:
        table.add_row(name, state, *(facts.get(column, Text()) for column in columns))
    needed = Measurement.get(stdout, stdout.options.update_width(WIDEST), table).minimum
    return table if needed <= stdout.width else _list(rows)


def _list(rows: Sequence[Shown]) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, state, facts in rows:
        table.add_row(state, name)
        said = [Text.assemble((f"{column} ", "dim"), text) for column, text in facts.items()]
        if said:
            table.add_row("", Text(", ").join(said))
    return table


def _spent(found: Batch) -> str:
    spent, budget = found.spent, found.budget
    said = f"{spent.seconds / 3600:.2f} hours"
    if budget.hours is not None:
        said += f" of {budget.hours:g}"
    if budget.price_per_worker_hour:
        money = spent.worker_seconds / 3600 * budget.price_per_worker_hour
        said += f", cost {money:.2f}" + (f" of {budget.money:g}" if budget.money else "")
    return f"used: {said}"


def sweep(run_uri: str, wanted: dict[str, Any], *, placement: dict[str, Any], json_: bool) -> None:
    """Do a sweep and print its table; ``wanted`` is the content of a `Wanted`."""
    config = recipe_of(Directory(run_uri))
    base = prepare(config.model_copy(update=placement))
    points = points_of(base, Wanted(**wanted))
    with ProgressScreen(stderr, num_workers=base.plan.num_workers) as listener:
        found = do_sweep(base, points, listener=listener)
    emit(found, lambda: print_sweep(run_uri, found), json_=json_)


def print_sweep(run_uri: str, found: Mapping[str, Any]) -> None:
    """Print the points of a sweep, as in ``pareto.json``, and the path of the page."""
    dense = found["dense"]["perplexity"]
    stdout.print(f"{found['model']}: dense perplexity {decimal(dense)}", soft_wrap=True)
    rows = []
    for point in found["points"]:
        kept, perplexity = point["keep_fraction"], point["perplexity"]
        read = judged(
            dense, perplexity, kept=kept,
            parameters=found["dense"]["parameters"], names=[point["method"]], bits=point["bits"],
        )  # fmt: skip
        size = {"weights": Text(bytes_text(point["bytes"]))} if found["over"] == "bytes" else {}
        quality = Text(read.word, style=TONES[read.tone])
        facts = size | _measured(kept, perplexity, dense, quality)
        facts["predicted error"] = Text(percent(point["predicted_error"]))
        rows.append((point["name"], Text("front" if point["on_front"] else ""), facts))
    stdout.print(_shown(("point", ""), rows))
    stdout.print(
        f"{run_uri}/{PAGE}; compress-cluster export {run_uri} --point NAME", soft_wrap=True
    )


def export(run_uri: str, point: str, terms: Pricing, *, yes: bool, json_: bool) -> None:
    """Finish one point of a sweep and print its report."""
    prepared = exported(Directory(run_uri), point)
    is_done = finished_report(prepared.run) is not None

    def started(prepared: Prepared) -> RunHooks:
        return started_run(prepared, terms, yes=yes, is_done=is_done)

    print_report(do_prepared(prepared, started), json_=json_)
