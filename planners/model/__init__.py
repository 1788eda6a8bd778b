"""A model as integers: shapes, forms, taps, parameters, bytes and operations."""
