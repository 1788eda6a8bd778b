"""What people look at: the report of a run as a page and as a summary on the terminal.

Both are made from the document that ``report.json`` holds, and from nothing else.
"""

from orchestrator.report.document import Document
from orchestrator.report.terminal import render_terminal

__all__ = ["render_page", "render_pareto", "render_terminal"]


def render_page(report: Document) -> str:
    """Return the whole HTML page; the plots' library is loaded here, as most commands draw none."""
    from orchestrator.report import page

    return page.render_page(report)


def render_pareto(sweep: Document) -> str:
    """Return the whole HTML page of a sweep, from the document that ``pareto.json`` holds."""
    from orchestrator.report import pareto

    return pareto.render_pareto(sweep)
