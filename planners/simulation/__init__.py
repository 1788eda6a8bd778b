"""How long a plan takes, by simulating it."""
