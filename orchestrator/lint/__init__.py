"""Checks of a machine, a text or a cluster file, before a run."""
