"""What runs in a worker process: a stage of layers, and the evaluator of results."""
