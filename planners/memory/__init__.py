"""Bytes: what a worker holds at its peak, and how layers are placed so that it fits."""
