"""Wording of messages about user input."""

import reprlib
from collections.abc import Sequence

from planners.spelling import nearest

MAX_NUMBER = 2**63
MAX_SHOWN = 200  # characters of a value in a message


def printable(name: str) -> str:
    """Return a name that is safe to print on a terminal."""
    return name if name.isprintable() else repr(name)


def short(value: object) -> str:
    """Return the Python repr of a value, cut if long."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "a huge number"  # which Python may refuse to print
    return "empty" if value in (None, "") else reprlib.repr(value)[:MAX_SHOWN]


def nearest_key(path: str, known: Sequence[str]) -> str:
    """Return the known keys whose last part is nearest to that of an unknown one, as a question."""
    section, _, name = path.rpartition(".")
    leaves = {key: key.rpartition(".")[2] for key in known}
    here = {key: leaf for key, leaf in leaves.items() if key.rpartition(".")[0] == section}
    for some in (here, leaves):
        meant = nearest(name, some.values())
        if meant:
            found = [key for key, leaf in some.items() if leaf == meant]
            return f"; did you mean {' or '.join(found)}?"
    return ""
