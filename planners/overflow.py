"""Messages about numbers that are too large for float16."""

from planners.errors import NumericsError

LARGEST_HALF = 65504
OTHER_WEIGHTS = (
    "use the model in bfloat16 or float32: the original weights, or these weights converted with "
    "from_pretrained(DIR, dtype='bfloat16').save_pretrained(NEW)"
)
OTHER_PASS = "use --calibration-dtype float32, or bfloat16 (in a recipe calibration_dtype)"


def overflowed(dtype: str) -> str:
    """Return the end of a message about NaN or infinite entries, if float16 may be the reason."""
    if dtype != "float16":
        return ""
    return f" in float16, whose largest number is {LARGEST_HALF}"


def found_behind(error: NumericsError, dtype: str) -> NumericsError:
    """Return an error of a calibration pass, with a hint where its float16 may be the reason."""
    if dtype != "float16" or error.hint:
        return error
    return NumericsError(f"{error}; the calibration pass was{overflowed(dtype)}", hint=OTHER_PASS)
