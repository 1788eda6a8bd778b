"""Units of work: their inputs, what determines their bytes, and which may start."""
