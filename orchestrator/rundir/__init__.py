"""The files of a run: layout, records, lease, events, kept statistics."""
