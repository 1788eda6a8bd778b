"""The options of methods, as given in a recipe, converted to their types."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from actors import methods
from orchestrator.recipe.config import RunConfig
from orchestrator.recipe.wording import MAX_NUMBER, printable, short
from planners.budget import candidates
from planners.budget.schemes import SCHEMES, TIE, resolved_schemes
from planners.errors import ConfigError
from planners.method import MethodSpec, Option, OptionSpec
from planners.spelling import did_you_mean, typed


class HasOptions(Protocol):
    """Name and options of a method: its whole spec, or what its source declares."""

    @property
    def name(self) -> str:
        """Name of the method."""

    @property
    def options(self) -> Sequence[OptionSpec]:
        """Its options."""


def resolve_steps(config: RunConfig, specs: Sequence[HasOptions]) -> list[dict[str, Option]]:
    """Return the options of every step.

    Raises:
        ConfigError: a method has no such option, or not with this value; the message has the path.
    """
    found = []
    for index, (step, spec) in enumerate(zip(config.chain, specs, strict=True)):
        try:
            own = resolve_options(spec, step.options)
            if {SCHEMES.name, TIE.name} <= {option.name for option in spec.options}:
                asked = config.targets[index].asked.keys() & {"keep_bytes", "bits"}
                own = resolved_schemes(own, budgets_bits=bool(asked))
            if own.get("servable") == "auto" and SCHEMES.name in own:
                own["servable"] = "remote"  # any widths
            if own.get("servable") == "auto" and len(config.chain) > 1:
                # The next step is planned on widths that are known.
                own["servable"] = "remote"
            if index < len(config.chain) - 1 and own.get("servable") in ("narrow_heads", "vllm"):
                raise ConfigError(
                    f"options.servable: {own['servable']} is a form of results, so only the last "
                    "step can have it"
                )
            found.append(own)
        except ConfigError as error:
            where = f"steps[{index}]." if config.steps else ""
            raise ConfigError(f"{where}{error}", hint=error.hint) from error
    return found


def chosen_methods(config: RunConfig, options: Sequence[Mapping[str, Option]]) -> list[MethodSpec]:
    """Return the method of every step, together with the candidates in its options.

    Raises:
        ConfigError: a candidate cannot be combined; the message has the path.
    """
    found = []
    for index, (step, own) in enumerate(zip(config.chain, options, strict=True)):
        try:
            found.append(methods.chosen(step.method, own))
        except ConfigError as error:
            where = f"steps[{index}]." if config.steps else ""
            raise ConfigError(f"{where}{error}", hint=error.hint) from error
    return found


def resolve_options(spec: HasOptions, options: Mapping[str, object]) -> dict[str, Option]:
    """Return a value for every option of a method, in the type of its default.

    Texts such as ``true``, ``16`` and ``0.5`` are read as what the default is, because
    ``--option KEY=VALUE`` has only texts.

    Raises:
        ConfigError: the method has no such option, or not with this value.
    """
    known = {option.name: option for option in spec.options}
    former = {option.former: option for option in spec.options if option.former}
    given = {}
    for name in options:
        option = known.get(name) or former.get(name)
        if option is None:
            raise ConfigError(
                f"options.{printable(name)}: {spec.name} has no such option"
                + did_you_mean(name, [*known, *former]),
                hint="its options and defaults: "
                + (", ".join(f"{o.name}={typed(o.default)}" for o in spec.options) or "none"),
            )
        given[option.name] = _checked(option, options[name], said=name)
    found = {name: given.get(name, option.default) for name, option in known.items()}
    if candidates.NAME in found:
        joining = candidates.others(spec.name, found)
        found[candidates.NAME] = ",".join([spec.name, *joining]) if joining else ""
    # An option without a default is empty; it is then treated as absent.
    return {
        name: value for name, value in found.items() if value != "" or known[name].default != ""
    }


def resolve_layer_options(
    spec: HasOptions, given: Mapping[int, Mapping[str, object]]
) -> dict[int, dict[str, Option]]:
    """Return layer -> the options that it has for itself, each in the type of its default.

    Raises:
        ConfigError: the method has no such option, or no layer can have it alone.
    """
    own = [option.name for option in spec.options if option.per_layer]
    found: dict[int, dict[str, Option]] = {}
    for layer, options in given.items():
        complete = resolve_options(spec, options)
        shared = [name for name in options if name not in own]
        if shared:
            raise ConfigError(
                f"layer_options.{layer}.{shared[0]}: must be the same for all layers of a run",
                hint=f"options of {spec.name} for single layers: {', '.join(own) or 'none'}",
            )
        found[layer] = {name: complete[name] for name in options}
    return found


def _checked(option: OptionSpec, value: object, *, said: str) -> Option:
    """Return the value of an option in its type; ``said`` is the name under which it was given."""
    converted = _converted(option.default, value)
    if converted is None:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(
            f"options.{said}: is {short(value)}; it must be {kind[type(option.default)]}"
        )
    if option.choices and converted not in option.choices:
        choices = ", ".join(map(typed, option.choices))
        raise ConfigError(
            f"options.{said}: is {short(value)}; it must be one of: {choices}"
            + did_you_mean(typed(converted), map(typed, option.choices))
        )
    if option.minimum is not None and float(converted) < option.minimum:
        raise ConfigError(
            f"options.{said}: is {short(value)}; it must be {option.minimum:g} or more"
        )
    return converted


def _converted(default: Option, value: object) -> Option | None:
    """Return ``value`` in the type of ``default``, or None where it cannot be read as that."""
    if isinstance(default, bool):
        word = value.lower() if isinstance(value, str) else value
        return {"true": True, "false": False}.get(typed(word))
    if isinstance(default, str):
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = type(default)(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not -MAX_NUMBER < value < MAX_NUMBER:
        return None
    if isinstance(default, int):
        return value if isinstance(value, int) else None
    return float(value)
