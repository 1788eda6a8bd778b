"""The consoles that commands print to."""

from orchestrator.report.console import Console

stderr = Console(stderr=True)
stdout = Console()
