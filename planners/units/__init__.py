"""Units of work: what each depends on, what determines its bytes, which may start."""
