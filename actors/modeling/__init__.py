"""Layers and models as torch modules, and how each form of a layer is stored and run."""
