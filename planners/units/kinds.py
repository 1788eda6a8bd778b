"""Kinds of units, and the phases that do them."""

UNITS_OF = {
    "calibrate": ("calibrate", "carried"),
    "evaluate": ("evaluate",),
    "allocate": ("damage", "losses"),
    "compress": (
        "basis",
        "basis_shared",
        "basis_sequential",
        "stream",
        "layer",
        "draft",
        "embedding",
        "head",
    ),
    "refit": ("refit_start", "refit_layer", "refit_losses", "chosen"),
    "stitch": ("stitch",),
    "verify": ("verify",),
    "throughput": ("throughput",),
}


LAYERS = ("layer", "draft", "chosen", "damage", "losses", "carried")  # units that are a layer each


FIRST_WORDS = {  # until the first unit of a phase is done
    "calibrate": "loading layers",
    "verify": "a fresh process loads the result, compares, generates",
    "throughput": "a fresh process times both models in turn",
}
