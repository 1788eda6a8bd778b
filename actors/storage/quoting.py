"""Quote untrusted text in messages: one line, without control characters."""

import os
import reprlib

from planners.errors import CompressionError

MAX_CHARACTERS = 300

_SHORT = reprlib.Repr()
_SHORT.maxstring = 200
_SHORT.maxlist = 16
_SHORT.maxlevel = 2  # nested lists could otherwise total a million values


def shown(value: object) -> str:
    """Return the ``repr`` of a value, truncated where it is long."""
    return _SHORT.repr(value)[:MAX_CHARACTERS]


def error_text(error: BaseException) -> str:
    """Return a library's error message in one line; it may quote the input it complains about."""
    line = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in line[:MAX_CHARACTERS])


def require_utf8(name: str, kind: type[CompressionError]) -> None:
    """Refuse a name that is not UTF-8: no recipe, journal or report could contain it.

    Raises:
        kind: it is not; names on Linux are bytes, which Python then stores as lone surrogates.
    """
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate, as JSON can have it: not the name of any file
        raw = name.encode(errors="surrogatepass")
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        readable = raw.decode(errors="backslashreplace")
        raise kind(
            f"{readable}: the name is not UTF-8, as recipes and reports require",
            hint="rename it with mv; a link to it does not help",
        ) from error
