"""Write the report, mark the run READY, remove temporary files."""

from collections.abc import Mapping
from typing import Any

from actors.storage.records import sealed
from orchestrator.phases.context import RunContext
from orchestrator.report import render_page
from orchestrator.rundir.finished import sha256
from orchestrator.rundir.layout import READY, REPORT, RESULT, STITCH, spent_files
from planners.canonical_json import json_bytes, to_json
from planners.units.units import Unit


def finish(context: RunContext, report: Mapping[str, Any]) -> None:
    """Write the report, mark the run READY, and remove the files that only the work needed."""
    run = context.run
    data = json_bytes(report)
    run.write(REPORT, data)
    run.write("report.html", render_page(report).encode())
    facts = to_json(context.prepared.facts)
    mark = {
        "identity": facts,
        "created": report["created"],
        "report": sha256(data),
        # A basis is no part of the result: its files are removed, its numbers are in the report.
        "units": sorted({*(u.name for u in context.units if _in_result(context, u)), STITCH}),
    }
    run.write(READY, sealed(mark))
    # Last: if the driver dies before READY, its successor still finds every file it needs.
    for name in spent_files(run, keep_statistics=context.prepared.config.keep_statistics):
        run.delete(name)


def _in_result(context: RunContext, unit: Unit) -> bool:
    return any(file.path.startswith(RESULT) for file in context.ledger.record(unit).files)
