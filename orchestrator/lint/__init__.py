"""What is wrong with a machine, a text or a cluster file, before it costs anything."""
