"""What strangers wrote, made fit for a message: one line, nothing that a terminal would obey."""

import os
import reprlib

from planners.errors import CompressionError

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


def require_utf8(name: str, kind: type[CompressionError]) -> None:
    """Refuse a name that is not UTF-8: no recipe, journal or report could hold it.

    Raises:
        kind: it is not; names on Linux are bytes, and Python keeps such ones as lone surrogates.
    """
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # half a letter, as JSON can have it: no name of any file
        raw = name.encode(errors="surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        readable = raw.decode(errors="backslashreplace")
        raise kind(
            f"{readable}: the name is not UTF-8, which recipes and reports are",
            hint="rename it with mv; a link to it does not help",
        ) from error
