"""Words as a recipe and the command line have them, and the known one nearest to a typo."""

import difflib
from collections.abc import Iterable

LONGEST = 64  # characters of a word: comparing more takes long, and nobody mistypes that much


def nearest(word: object, known: Iterable[str]) -> str:
    """Return the known word that is spelt most like another, or an empty text where none is near.

    Case does not count: ``SliceGPT`` is near ``slicegpt``. What a file holds where a word belongs
    may be anything else, which is near none.
    """
    if not isinstance(word, str) or len(word) > LONGEST:
        return ""
    spelt = {each.lower(): each for each in sorted(known)}
    close = difflib.get_close_matches(word.lower(), spelt, n=1)
    return spelt[close[0]] if close else ""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return ``; did you mean X?`` for the end of a message, or nothing where no word is near."""
    found = nearest(word, known)
    return f"; did you mean {found}?" if found else ""


def typed(value: object) -> str:
    """Return a value as it is typed: ``true`` and not ``True``."""
    return str(value).lower() if isinstance(value, bool) else str(value)
