"""The option ``modules`` of methods that factor single linears."""

from collections.abc import Mapping

from planners.method import Option
from planners.model.layer import ROLES
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF, Statistic
from planners.spelling import did_you_mean


def named(options: Mapping[str, Option]) -> tuple[str, ...]:
    """Return the linears that are named, known ones first and in the order of the layer."""
    given = [name.strip() for name in str(options["modules"]).split(",")]
    known = [name for name in ROLES if name in given]
    return tuple(known + [name for name in given if name not in ROLES])


def of_model(shape: ModelShape, options: Mapping[str, Option]) -> tuple[str, ...]:
    """Return the linears that are named and that some layer of the model has."""
    found = {role for kind in shape.kinds for role in kind.roles}
    return tuple(name for name in named(options) if name in found)


def grams(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
    """Return the Gram matrices of their inputs."""
    return frozenset(Statistic(INPUT_OF[name], "gram") for name in of_model(shape, options))


def refuses(options: Mapping[str, Option]) -> str:
    """Return which names are of no linear, or an empty string."""
    unknown = [name for name in named(options) if name not in ROLES]
    if not unknown:
        return ""
    message = f"modules has {', '.join(unknown)}; known: {', '.join(ROLES)}"
    return message + did_you_mean(unknown[0], ROLES)
