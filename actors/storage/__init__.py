"""The only part that opens files: checkpoints, the run directory, texts and tokens."""
