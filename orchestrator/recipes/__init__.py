"""Recipes that come with the package: the files of this folder, named without their ending.

The first line of each says, behind its ``#``, what it is for. ``run -r NAME`` takes one as if its
file had been given; options on the command line come on top.
"""

from importlib import resources

from planners.errors import ConfigError

ENDING = ".yaml"


def available() -> dict[str, str]:
    """Return name -> what it is for, sorted."""
    files = resources.files(__name__).iterdir()
    names = sorted(f.name.removesuffix(ENDING) for f in files if f.name.endswith(ENDING))
    return {name: text(name).partition("\n")[0].lstrip("# ") for name in names}


def text(name: str) -> str:
    """Return the YAML of a recipe.

    Raises:
        ConfigError: there is none of that name; the message lists those there are.
    """
    file = resources.files(__name__).joinpath(f"{name}{ENDING}")
    if "/" in name or not file.is_file():
        raise ConfigError(f"no recipe {name!r} comes with the package", hint=f"known: {_known()}")
    return file.read_text(encoding="utf-8")


def _known() -> str:
    files = resources.files(__name__).iterdir()
    return ", ".join(sorted(f.name.removesuffix(ENDING) for f in files if f.name.endswith(ENDING)))
