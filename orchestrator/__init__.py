"""RUN: the only package that knows a cluster."""
