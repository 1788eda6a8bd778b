"""The registry of model families: the files of this folder, matched by ``model_type``."""

import pkgutil
from importlib import import_module

from planners.errors import ModelError
from planners.families._base import Family

MAX_CHARACTERS = 64  # of what a config says, in a message


def available() -> tuple[str, ...]:
    """Return the names of all families, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(name: str) -> Family:
    """Return the family of that name."""
    family: Family = import_module(f"planners.families.{name}").FAMILY
    return family


def known_types() -> dict[str, Family]:
    """Return model_type -> family of all that a family claims, sorted."""
    families = [load(name) for name in available()]
    return {t: family for family in families for t in sorted(family.classes)}


def family_of(model_type: object) -> Family:
    """Return the family of a checkpoint whose ``config.json`` says ``model_type``.

    Raises:
        ModelError: no family claims it; the message lists the model types that are claimed.
    """
    known = known_types()
    if not isinstance(model_type, str) or not model_type:
        said = "missing" if model_type is None else repr(model_type)[:MAX_CHARACTERS]
        raise ModelError(
            f"config.json: model_type is {said}; it must be one of: {', '.join(known)}"
        )
    if model_type in known:
        return known[model_type]
    # Most types that are spelt alike are other models: mixtral, mllama and llama4 are no slips.
    meant = [t for t in known if _is_slip(model_type, t)]
    raise ModelError(
        f"model_type {model_type[:MAX_CHARACTERS]!r} is not supported; supported: "
        f"{', '.join(known)}" + "".join(f"; did you mean {t}?" for t in meant),
        hint=""
        if meant
        else "no file in planners/families says how such a model names its tensors; "
        "CONTRIBUTING.md says what one needs",
    )


def _is_slip(word: str, known: str) -> bool:
    """Return whether a word is another in other case or punctuation, or lacks a letter of it."""
    spelt = "".join(c for c in word.lower() if c.isalnum())
    shorter = [known[:i] + known[i + 1 :] for i, c in enumerate(known) if c.isalpha()]
    return spelt in (known, *shorter)
