"""The phases of a run, one file a row of `orchestrator/run.py`."""
