"""COMPUTE: plain classes and pure functions on tensors; never ray, never the orchestrator."""
