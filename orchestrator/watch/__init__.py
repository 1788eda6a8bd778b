"""Watching a run from outside: its directory alone is read, wherever the run goes on."""
