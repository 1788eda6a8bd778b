"""What runs in a worker: a stage of layers, and the process that checks results."""
