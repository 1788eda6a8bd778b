"""Work that survives lost workers: passes, units, the pool, retries, stalls."""
