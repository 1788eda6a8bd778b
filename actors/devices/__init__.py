"""Memory of a process or a device, and transfers between them."""
