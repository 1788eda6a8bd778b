"""Many results from one calibration: batches, sweeps, layers made again, comparisons."""
