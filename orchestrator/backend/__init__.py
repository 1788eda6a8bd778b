"""Where the work runs: on a Ray cluster, or in this process. Ray is imported here only."""
