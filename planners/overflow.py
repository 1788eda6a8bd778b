"""Numbers that float16 cannot hold, as messages say it."""

from planners.errors import NumericsError

LARGEST_HALF = 65504
OTHER_WEIGHTS = (
    "use the model in bfloat16 or float32: the weights that these were converted from, or these as "
    "from_pretrained(DIR, dtype='bfloat16').save_pretrained(NEW) writes them"
)
OTHER_PASS = "--calibration-dtype float32, or bfloat16 (in a recipe calibration_dtype)"


def overflowed(dtype: str) -> str:
    """Return the end of a message about numbers that are none: where float16 may be the reason."""
    if dtype != "float16":
        return ""
    return f" in float16, whose largest number is {LARGEST_HALF}"


def found_behind(error: NumericsError, dtype: str) -> NumericsError:
    """Return an error of numbers that a calibration pass in some dtype gave, with what may help."""
    if dtype != "float16" or error.hint:
        return error
    return NumericsError(f"{error}; the calibration pass was{overflowed(dtype)}", hint=OTHER_PASS)
