"""The speeds of models side by side, as a table."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from actors.messages import WorkerSetup
from orchestrator.examine import bench as measure
from orchestrator.prepare import GIB, chosen_device, usable_gib
from orchestrator.report.numbers import bytes_text
from orchestrator.terminal import Console
from orchestrator.throughput import Workers

NUMBERS = ("batch", "workers", "prefill tok/s", "decode tok/s", "peak memory")

_out = Console()


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
    rows = measure(
        directories,
        setup=WorkerSetup(name="pattern", incarnation="", threads=threads, device=chosen),
        workers=Workers(number=workers, bytes=int(memory * GIB)),
        **how,
    )
    if json_:
        print(json.dumps({"rows": rows}))  # noqa: T201 the one document
        return
    table = Table(title=f"prompt {how['prompt']}, {how['new_tokens']} new", title_justify="left")
    for column in ("model", *NUMBERS):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        table.add_row(row["model"], str(row["batch"]), *_numbers(row))
    _out.print(table)
    for row in rows:
        if "not_measured" in row:
            said = f"{row['model']}, batch {row['batch']}: not measured: {row['not_measured']}; "
            _out.print(said + "use more --workers, or --worker-gib", soft_wrap=True)


def _numbers(row: dict[str, Any]) -> tuple[str, ...]:
    if "not_measured" in row:
        return ("-",) * (len(NUMBERS) - 1)
    return (
        str(row.get("stages", 1)),
        f"{row['prefill_tokens_per_second']:,.0f}",
        f"{row['decode_tokens_per_second']:,.0f}",
        bytes_text(row["peak_bytes"]),
    )
