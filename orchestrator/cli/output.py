"""Printing: consoles, JSON documents, and streams that accept any text in any encoding."""

import codecs
import contextlib
import errno
import io
import json
import os
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import click
import rich.console

from planners.errors import StorageError

SURROGATES = range(0xDC80, 0xDD00)  # a byte of a name that is not UTF-8, as Python keeps it
# One for one, so that columns stay aligned.
LOOKALIKES = {
    **{"\u00b7": "-", "\u2022": "*", "\u2013": "-", "\u2014": "-", "\u2212": "-", "\u00a0": " "},
    **{"\u00d7": "x", "\u2192": ">", "\u2190": "<", "\u2026": "~", "\u2713": "v", "\u2717": "x"},
    **{"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2248": "~"},
    **{"\u2264": "<", "\u2265": ">"},
    **dict(zip("▁▂▃▄▅▆▇", "_.-=+*%", strict=True)),  # of curves: by height
    **dict.fromkeys("█▏▎▍▌▋▊▉░▒▓", "#"),
    **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),  # rich's spinner
}


class Console(rich.console.Console):
    """A console that prints paths and messages as they are: a "[" or ":" has no meaning there."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        """Let `streams` handle a closed pipe, as for output that no console prints."""
        raise  # rich calls this where it has caught the error


stderr, stdout = Console(stderr=True), Console()


def emit(document: Any, show: Callable[[], None], *, json_: bool) -> None:
    """Print one JSON document for machines, or call ``show`` for people."""
    if json_:
        echo(json.dumps(document))
    else:
        show()


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print a text to stdout or stderr in the stream's encoding; click would use UTF-8."""
    click.echo(text, file=sys.stderr if err else sys.stdout, nl=nl)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    r"""Let stdout and stderr accept any text in this block, and end quietly on a closed pipe.

    A character that their encoding lacks is replaced by a lookalike, a letter by its number:
    ``caf\xe9``. JSON is not changed: its documents are ASCII.

    Raises:
        SystemExit: with 1, the reader closed the pipe; with 6, the disk is full.
    """
    codecs.register_error("lookalike", _lookalike)
    both = (sys.stdout, sys.stderr)  # click puts others there once nobody reads
    for stream in both:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="lookalike")
    failed: set[int | None] = set()
    try:
        yield
    except BrokenPipeError:
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        failed.add(errno.ENOSPC)
    finally:
        failed |= {_flush(stream) for stream in both}
        if errno.ENOSPC in failed:
            with contextlib.suppress(OSError):  # stderr may go there too
                echo(f"StorageError: stdout: {os.strerror(errno.ENOSPC)}", err=True)
            raise SystemExit(StorageError.exit_code)


def _flush(stream: TextIO | None) -> int | None:
    """Flush; return the errno if that fails, and keep the interpreter from trying again."""
    if stream is None:  # closed by who started this process
        return None
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error.errno
    return None


def _lookalike(error: UnicodeError) -> tuple[str, int]:
    """Return the replacement of characters that cannot be encoded, and where to continue."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_replaced, error.object[error.start : error.end])), error.end


def _replaced(letter: str) -> str:
    if ord(letter) in SURROGATES:
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if letter in LOOKALIKES:
        return LOOKALIKES[letter]
    if letter.isalpha():  # part of a name, which without it is another name
        return letter.encode("ascii", "backslashreplace").decode()
    plain = unicodedata.normalize("NFKD", letter)
    return plain if plain.isascii() and len(plain) == 1 else "?"
