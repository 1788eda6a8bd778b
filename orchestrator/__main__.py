"""``python -m orchestrator`` is ``compress-cluster``, where that is not on the path."""

from orchestrator.cli.main import main

main()
