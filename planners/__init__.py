"""DECIDE: data in, data out. No torch, no ray, opens no file."""
