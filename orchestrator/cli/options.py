"""Options of commands; those that set a key of the recipe are built from the recipe's fields."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import click

from orchestrator.cli import completion
from planners.errors import ConfigError
from planners.method import OptionSpec
from planners.spelling import typed

as_json = click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")
yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
run_argument = click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
model_argument = click.argument("model", required=False, shell_complete=completion.models)
recipe_file = click.option(
    "-r", "--recipe", metavar="FILE.yaml", shell_complete=completion.recipes,
    help="File that sets any of these, such as the run.yaml of a run, or a name from "
    "`compress-cluster recipes ls`.",
)  # fmt: skip
_TERMS = (
    click.option("--price", type=click.FloatRange(min=0), metavar="P",
                 help="Price of one worker for one hour, for the cost forecast."),
    click.option("--preemptions-per-hour", type=click.FloatRange(min=0), default=0.0, metavar="R",
                 help="Expected preemptions of one worker per hour. [0]"),
)  # fmt: skip
_PLACEMENT = (
    click.option("--workers", type=int, help="Number of workers. [as in the run]"),
    click.option("--address", help="Ray cluster. [as in the run]"),
)


def terms(command: Any) -> Any:
    """Add the options on the price and the preemptions of workers."""
    return _TERMS[0](_TERMS[1](command))


def terms_of(given: dict[str, Any]) -> dict[str, float]:
    """Pop the options of `terms` from those of a command; return those that were given."""
    found = {name: given.pop(name) for name in ("price", "preemptions_per_hour")}
    return {name: value for name, value in found.items() if value}


def pricing(given: dict[str, Any]) -> Any:
    """Pop the options of `terms`, and ``--measure``, from those of a command."""
    from orchestrator.forecast.pricing import Pricing

    price, losses = given.pop("price"), given.pop("preemptions_per_hour")
    measure = given.pop("measure", False)
    return Pricing(price_per_hour=price, preemptions_per_hour=losses, measure=measure)


def placement(command: Any) -> Any:
    """Add the options on where the work on an existing run is done."""
    return _PLACEMENT[0](_PLACEMENT[1](command))


def placement_of(given: dict[str, Any]) -> dict[str, Any]:
    """Pop the options of `placement` from those of a command; return those that were given."""
    found = {name: given.pop(name) for name in ("workers", "address")}
    return {name: value for name, value in found.items() if value is not None}


class RecipeCommand(click.Command):
    """A command with an option for the keys of a recipe, all or some of them.

    The command gets each value under its key, such as ``calibration.source``, and None for what was
    not on the command line. The options are built on first use: importing the recipe takes longer
    than ``compress-cluster --help`` may.
    """

    def __init__(self, *args: Any, keys: Container[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keys, self._made = keys, False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return all parameters, those of the recipe first."""
        if not self._made:
            made = recipe_options()
            chosen = [o for key, o in made.items() if key in self._keys or not self._keys]
            self.params, self._made = [*chosen, *self.params], True
        return super().get_params(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write method -> options with defaults, for a command that takes a whole recipe."""
        super().format_epilog(ctx, formatter)
        if self._keys:
            return
        from actors.methods import available, declared_options

        with formatter.section("Options of methods, for --option, with their defaults"):
            formatter.write_dl([
                (name, " ".join(f"{o.name}={typed(o.default)}" for o in declared_options(name)))
                for name in available()
            ])  # fmt: skip


def recipe_options() -> dict[str, click.Option]:
    """Return key of the recipe -> the option that sets it; not all keys have one."""
    from orchestrator.recipe.config import SECTIONS, Flag, RunConfig

    found = {}
    for name, field in RunConfig.model_fields.items():
        inner = SECTIONS[name].model_fields if name in SECTIONS else {}
        for key, each in ({f"{name}.{k}": v for k, v in inner.items()} or {name: field}).items():
            for flag in (part for part in each.metadata if isinstance(part, Flag)):
                found[key] = _option(key, each, flag)
    return found


def _option(key: str, field: Any, flag: Any) -> click.Option:
    """Return the option that a key's flag describes; its type and default are the field's."""
    name, _, metavar = flag.option.partition(" ")
    kinds, default = list(_kinds(field.annotation)), field.default
    many, is_flag = list in kinds or dict in kinds, kinds == [bool]
    number = None if many else next((kind for kind in (int, float) if kind in kinds), None)
    words = [kind for kind in kinds if isinstance(kind, str) and not number]
    is_told = flag.help.endswith("]") or is_flag or default in (None, "", [])
    option = click.Option(
        [name],
        type=number,
        metavar=metavar or None,
        is_flag=is_flag,
        default=None,
        multiple=many,
        help=flag.help if is_told else f"{flag.help} [{typed(default)}]",
        shell_complete=completion.of_option(name, words),
    )
    option.name = key
    return option


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types that a value may have, and the words of a Literal."""
    yield getattr(annotation, "__origin__", annotation)
    for part in get_args(annotation):
        yield from _kinds(part)


def config_of(model: str | None, given: dict[str, Any]) -> Any:
    """Return the recipe of a command line; ``given`` is what click parsed.

    Raises:
        ConfigError: an option is wrong, or the recipe file is.
    """
    from actors.methods import declared_options
    from orchestrator.recipe.method_options import resolve_steps
    from orchestrator.recipe.reading import load_config

    options = {f"options.{key}": value for key, value in pairs_of(given.pop("options", ())).items()}
    recipe = given.pop("recipe")
    given["steps"] = [step_of(text) for text in given.pop("steps", ())] or None
    config = load_config(recipe, {"model": model, **given, **options})
    if any(step.options for step in config.chain):
        methods = [step.method for step in config.chain]
        resolve_steps(config, [Declared(name, declared_options(name)) for name in methods])
    return config


def step_of(text: str) -> dict[str, Any]:
    """Return the step of ``METHOD:F[:KEY=VALUE...]``; no name and no value contains a colon.

    Raises:
        ConfigError: the text is not of that form.
    """
    from planners.budget.schemes import QUANTISER

    method, *parts = text.split(":")
    pairs = dict(part.partition("=")[::2] if "=" in part else ("keep_fraction", part)
                 for part in parts)  # fmt: skip
    sizes = {key: pairs.pop(key) for key in ("keep_fraction", "slice") if key in pairs}
    if not method or not (sizes or method == QUANTISER):
        raise ConfigError(
            f"--step {text}: must be METHOD:F, or METHOD:F:KEY=VALUE with one or more KEY=VALUE",
            hint="such as --step modegpt:0.9:modules=mlp,vo, --step slicegpt:slice=0.2, or --step "
            "gptq:bits=4:group=64",
        )
    try:
        return {"method": method, **{k: float(v) for k, v in sizes.items()}, "options": pairs}
    except ValueError as error:
        raise ConfigError(f"--step {text}: {', '.join(sizes.values())} is not a number") from error


def pairs_of(options: Sequence[str]) -> dict[str, str]:
    """Return key -> value of texts such as ``round_to=16``.

    Raises:
        ConfigError: one of them is no pair.
    """
    for pair in options:
        if "=" not in pair:
            raise ConfigError(f"--option {pair}: must be KEY=VALUE")
    return dict(pair.split("=", 1) for pair in options)


@dataclass(frozen=True, slots=True)
class Declared:
    """Name and options of a method, known without importing it."""

    name: str
    options: tuple[OptionSpec, ...]
