"""Validation and planning: find everything that can be wrong before workers are reserved."""
