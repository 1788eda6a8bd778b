"""Recipes that come with the package: the files of this folder, named without their ending.

The first line of each, after its ``#``, is its purpose. ``run -r NAME`` uses one as if its file had
been given; options on the command line override it.
"""

from importlib import resources

from planners.errors import ConfigError
from planners.spelling import did_you_mean

ENDING = ".yaml"


def available() -> dict[str, str]:
    """Return name -> purpose, sorted."""
    return {name: text(name).partition("\n")[0].lstrip("# ") for name in _names()}


def text(name: str) -> str:
    """Return the YAML of a recipe.

    Raises:
        ConfigError: there is none of that name; the hint lists those there are.
    """
    file = resources.files(__name__).joinpath(f"{name}{ENDING}")
    if "/" in name or not file.is_file():
        raise ConfigError(
            f"no recipe {name!r} comes with the package{did_you_mean(name, _names())}",
            hint=f"there are: {', '.join(_names())}",
        )
    return file.read_text(encoding="utf-8")


def _names() -> list[str]:
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(ENDING) for f in files if f.name.endswith(ENDING))
