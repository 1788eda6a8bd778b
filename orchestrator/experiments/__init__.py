"""Many results from one calibration: batches, sweeps, recomputed layers, checks of results."""
