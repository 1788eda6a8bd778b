"""Pure tensor maths: no file, no model library, no cluster; float64 inside."""
