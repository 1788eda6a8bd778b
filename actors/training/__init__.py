"""Training of compressed models: losses, steps, adapters, checkpoints, and the loop over them."""
