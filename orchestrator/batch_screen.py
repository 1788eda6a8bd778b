"""What `compress-cluster batch` prints: how each run goes, then the table."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.batch import Batch, Entry, Row, do_batch, read_batch, table_of
from orchestrator.journal import Event
from orchestrator.progress import ProgressScreen
from planners.errors import ClusterError, CompressionError

COLOURS = {"READY": "green", "failed": "red", "waiting": "yellow"}
_err = Console(stderr=True, highlight=False, markup=False, emoji=False)
_out = Console(highlight=False, markup=False, emoji=False)


def batch(path: str, *, dry_run: bool, json_: bool) -> None:
    """Do a batch and print its table.

    Raises:
        ClusterError: the budget is spent and runs are left.
        CompressionError: a run failed.
    """
    found = read_batch(path)
    if dry_run:
        _print(found, table_of(found), json_=json_)
        return
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
    failed = [row for row in rows if row.state == "failed"]
    waiting = [row for row in rows if row.state == "waiting"]
    if failed:
        raise CompressionError(
            f"{len(failed)} of {len(rows)} runs failed: {failed[0].name}: {failed[0].error}",
            hint="the others are done; the same command tries those that failed again",
        )
    if waiting:
        raise ClusterError(
            f"the budget is spent; {len(waiting)} of {len(rows)} runs are left",
            hint="raise the budget in the file; the same command goes on",
        )


def _print(found: Batch, rows: Sequence[Row], *, json_: bool) -> None:
    if json_:
        document = {"out": found.out, "spent": asdict(found.spent), "runs": list(map(asdict, rows))}
        print(json.dumps(document))  # noqa: T201 the one document
        return
    table = Table(title=found.out, title_justify="left")
    table.add_column("run", overflow="fold")
    table.add_column("state")
    for column in ("kept", "perplexity", "over dense", "took"):
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
            f"{row.seconds:,.0f} s" if done else "",
            row.calibration,
        )
    _out.print(table)
    for row in rows:
        if row.error:
            _out.print(f"{row.name}: {row.error}", soft_wrap=True)
    _out.print(_spent(found))


def _spent(found: Batch) -> str:
    spent, budget = found.spent, found.budget
    said = f"{spent.seconds / 3600:.2f} hours"
    if budget.hours is not None:
        said += f" of {budget.hours:g}"
    if budget.price_per_worker_hour:
        money = spent.worker_seconds / 3600 * budget.price_per_worker_hour
        said += f", {money:.2f} of money" + (f" of {budget.money:g}" if budget.money else "")
    return f"used: {said}"
