"""How long a run takes and what it costs, before it starts."""
