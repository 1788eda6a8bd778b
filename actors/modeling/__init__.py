"""The forms: how a compressed layer is stored and run."""
