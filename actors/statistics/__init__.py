"""Statistics of activations: accumulated by hooks, written to files, rotated to another basis."""
