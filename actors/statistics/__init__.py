"""What is accumulated from activations: by hooks, in files, rotated to another basis."""
