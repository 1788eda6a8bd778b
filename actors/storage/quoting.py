"""What strangers wrote, made fit for a message: one line, nothing that a terminal would obey."""

import reprlib

MAX_CHARACTERS = 300

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_SHORT.maxlist = 16
_SHORT.maxlevel = 2  # lists in lists would come to a million values otherwise


def shown(value: object) -> str:
    """Return a value as Python writes it, cut where it is long."""
    return _SHORT.repr(value)[:MAX_CHARACTERS]


def said(error: BaseException) -> str:
    """Return what a library says about an input, which may quote the input."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_CHARACTERS])
