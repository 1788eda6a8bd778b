"""Cluster files: what they say, and what is wrong with them before a machine is rented."""
