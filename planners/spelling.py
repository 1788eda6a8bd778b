"""How values are spelled in recipes and commands; suggest the closest known name for a typo."""

import difflib
from collections.abc import Iterable

LONGEST = 64  # characters of a word: comparing longer ones is slow, and they are not typos


def nearest(word: object, known: Iterable[str]) -> str:
    """Return the known word with the closest spelling, or an empty string where none is close.

    Case is ignored. ``word`` may be any value from a file; only a string can be close to one.
    """
    if not isinstance(word, str) or len(word) > LONGEST:
        return ""
    spelt = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(word.lower(), spelt, n=1)
    return spelt[close[0]] if close else ""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the end of a message, or nothing where no word is close."""
    found = nearest(word, known)
    return f"; did you mean {found}?" if found else ""


def typed(value: object) -> str:
    """Return a value as it is typed: ``true`` and not ``True``."""
    return str(value).lower() if isinstance(value, bool) else str(value)
