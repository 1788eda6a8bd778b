"""The classes that run in worker processes: a stage of layers, and the evaluator of results."""
