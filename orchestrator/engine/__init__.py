"""Work that survives lost workers: passes, units, the pool, failures, stalls."""
