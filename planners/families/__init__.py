"""The registry of model families: the files of this folder, matched by ``model_type``."""

import pkgutil
from importlib import import_module

from planners.errors import ModelError
from planners.families._base import Family
from planners.model.shape import ModelShape

MAX_CHARACTERS = 64  # of a config's value in a message


def available() -> tuple[str, ...]:
    """Return the names of all families, sorted."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def load(name: str) -> Family:
    """Return the family of that name."""
    family: Family = import_module(f"planners.families.{name}").FAMILY
    return family


# Sizes of a small model in the keys of all families, for what holds at any size.
EXAMPLE = {
    "hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip


def example_shape(model_type: str) -> ModelShape:
    """Return the shape of a small model of a supported type."""
    return family_of(model_type).shape_of({"model_type": model_type, **EXAMPLE}, "float32")


def known_types() -> dict[str, Family]:
    """Return model_type -> family for every supported model type, sorted."""
    found = {t: family for family in map(load, available()) for t in family.classes}
    return dict(sorted(found.items()))


def family_of(model_type: object) -> Family:
    """Return the family of a checkpoint with that ``model_type`` in its ``config.json``.

    Raises:
        ModelError: no family supports it; the message lists the supported model types.
    """
    known = known_types()
    if not isinstance(model_type, str) or not model_type:
        shown = "missing" if model_type is None else repr(model_type)[:MAX_CHARACTERS]
        raise ModelError(
            f"config.json: model_type is {shown}; it must be one of: {', '.join(known)}"
        )
    if model_type in known:
        return known[model_type]
    # Most similar names are other models: mixtral, mllama and llama4 are not typos.
    meant = [t for t in known if _is_typo(model_type, t)]
    raise ModelError(
        f"model_type {model_type[:MAX_CHARACTERS]!r} is not supported; supported: "
        f"{', '.join(known)}" + "".join(f"; did you mean {t}?" for t in meant),
        hint=""
        if meant
        else "no file in planners/families gives the tensor names of such a model; "
        "CONTRIBUTING.md explains how to add one",
    )


def _is_typo(word: str, known: str) -> bool:
    """Return whether two words differ only in case, punctuation or one missing letter."""
    spelt = "".join(c for c in word.lower() if c.isalnum())
    shorter = [known[:i] + known[i + 1 :] for i, c in enumerate(known) if c.isalpha()]
    return spelt in (known, *shorter)
