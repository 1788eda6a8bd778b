"""One function for each kind of unit: files in, files out."""
