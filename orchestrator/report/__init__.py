"""What people look at: the report of a run as a page and as a summary on the terminal.

Both are made from the document that ``report.json`` holds, and from nothing else.
"""

from orchestrator.report.page import render_page
from orchestrator.report.terminal import render_terminal

__all__ = ["render_page", "render_terminal"]
