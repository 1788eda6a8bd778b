"""Copy a model to this machine, for libraries that cannot read from an object store."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from actors.storage.files import Directory
from planners.errors import DataError

TOKENIZER_SUFFIXES = (".json", ".model", ".txt", ".jinja")
MAX_TOKENIZER_BYTES = 2**26  # twice that of the largest vocabularies in use


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a model directory as a local folder: itself, or a temporary copy."""
    directory = Directory(uri)
    if directory.is_local:
        yield Path(directory.root)
        return
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        _copy(directory, directory.names(), Path(folder))
        yield Path(folder)


@contextlib.contextmanager
def local_tokenizer(uri: str) -> Iterator[Path]:
    """Yield a folder with a model's tokenizer and config: its own, or a temporary copy of them.

    Raises:
        DataError: a file is too large for a tokenizer.
    """
    directory = Directory(uri)
    if directory.is_local:
        yield Path(directory.root)
        return
    wanted = [name for name in directory.entries() if name.endswith(TOKENIZER_SUFFIXES)]
    wanted = [name for name in wanted if not name.endswith(".index.json")]
    for name in wanted:
        size = directory.size(name) or 0
        if size > MAX_TOKENIZER_BYTES:
            raise DataError(
                f"{directory.path(name)}: is {size} bytes, too large for a tokenizer (limit "
                f"{MAX_TOKENIZER_BYTES})"
            )
    with tempfile.TemporaryDirectory(prefix="compress-cluster-") as folder:
        _copy(directory, wanted, Path(folder))
        try:
            yield Path(folder)
        except DataError as error:  # it names the copy, which the user does not know
            message = str(error).replace(folder, directory.path("").rstrip("/"))
            raise DataError(message, hint=error.hint) from error


def _copy(directory: Directory, names: list[str], folder: Path) -> None:
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            file.writelines(directory.pieces(name))
