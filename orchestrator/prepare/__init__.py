"""Everything that can be wrong is found here, before a worker is held."""
