"""A run elsewhere: submit it as a job, and follow it from its directory."""
