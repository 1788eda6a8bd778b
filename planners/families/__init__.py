"""The registry of model families: the files of this folder, matched by ``model_type``."""

import pkgutil
from importlib import import_module

from planners.errors import ModelError
from planners.families._base import Family
from planners.spelling import did_you_mean


def available() -> tuple[str, ...]:
    """Return the names of all families, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(name: str) -> Family:
    """Return the family of that name."""
    family: Family = import_module(f"planners.families.{name}").FAMILY
    return family


def family_of(model_type: str) -> Family:
    """Return the family of a checkpoint whose ``config.json`` says ``model_type``.

    Raises:
        ModelError: no family claims it; the message lists the model types that are claimed.
    """
    families = [load(name) for name in available()]
    for family in families:
        if model_type in family.model_types:
            return family
    known = sorted(t for family in families for t in family.model_types)
    raise ModelError(
        f"model_type {model_type!r} is not supported; supported: {', '.join(known)}"
        + did_you_mean(model_type, known)
    )
