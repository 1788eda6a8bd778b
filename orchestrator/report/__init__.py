"""The report of a run, as an HTML page and as a summary on the terminal.

Both are made from the document in ``report.json`` only.
"""

from orchestrator.report.document import Document
from orchestrator.report.terminal import render_terminal

__all__ = ["render_page", "render_pareto", "render_terminal"]


def render_page(report: Document) -> str:
    """Return the HTML page; its modules are loaded here, as most commands need none."""
    from orchestrator.report import page

    return page.render_page(report)


def render_pareto(sweep: Document) -> str:
    """Return the HTML page of a sweep, from the document in ``pareto.json``."""
    from orchestrator.report import pareto

    return pareto.render_pareto(sweep)
