"""The options that make a recipe; each is one key of it, and what is not given stays open."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from typing import Any

import click

from orchestrator.cli import completion
from planners.errors import ConfigError
from planners.method import Option, OptionSpec

Decorator = Callable[[Any], Any]

KEYS = {
    "slice_": "slice",
    "calibration": "calibration.source",
    "calibration_sequences": "calibration.sequences",
    "sequence_length": "calibration.sequence_length",
    "microbatch_tokens": "calibration.microbatch_tokens",
    "save_microbatches": "calibration.save_microbatches",
    "shards": "calibration.shards",
    "evaluation": "evaluation.source",
    "evaluation_sequences": "evaluation.sequences",
}
SOURCES = (
    "stdlib, wikitext2, embedded, FILE.txt, .jsonl (either also .gz, .zst) or .parquet, "
    "or tokens:FILE.safetensors."
)
_SOURCE = completion.of(*completion.SOURCES, otherwise=completion.FILE)

_COMPRESSION = (
    click.option("--method", metavar="NAME", shell_complete=completion.methods,
                 help="How layers shrink. [modegpt; slicegpt with --slice]"),
    click.option("--keep-fraction", type=float, metavar="F",
                 help="Parameters after / before, true counts, embeddings included. [0.8]"),
    click.option("--slice", "slice_", type=float, metavar="F",
                 help="In its place: SliceGPT's nominal fraction of the width to remove; fewer "
                 "parameters go than it says."),
    click.option("--step", "steps", multiple=True, metavar="METHOD:F[:KEY=VALUE...]",
                 shell_complete=completion.steps,
                 help="One of several methods, in order, in place of the three above and --option: "
                 "F of the input model's parameters is left after it; slice=F for a nominal "
                 "slice. Options follow, a colon before each: --step modegpt:0.9:modules=mlp,vo "
                 "--step slicegpt:0.8"),
    click.option("--option", "options", multiple=True, metavar="KEY=VALUE",
                 shell_complete=completion.options,
                 help="An option of the method, see below; may be repeated."),
    click.option("--calibration", metavar="SRC", shell_complete=_SOURCE,
                 help=f"{SOURCES} [embedded for tiny, else stdlib]"),
    click.option("--calibration-sequences", type=int, metavar="N",
                 help="How many. [all of a token file, 128 of text]"),
    click.option("--calibration-dtype", metavar="DTYPE",
                 shell_complete=completion.of("auto", "float32", "bfloat16", "float16"),
                 help="float32, bfloat16 or float16. [float32 on a CPU, else the model's own]"),
    click.option("--statistics-dtype", metavar="DTYPE",
                 shell_complete=completion.of("float64", "float32"),
                 help="float64, or float32: half the disk for statistics, each rounded by at most "
                 "6e-8 of itself. [float64]"),
    click.option("--save-microbatches", type=int, metavar="N",
                 help="Keep partial sums after so many, to go on from when a worker is lost; 0 is "
                 "never. [where it takes at most 5 % of the time]"),
    click.option("--shards", type=int, metavar="N",
                 help="Sum so many parts of the calibration tokens side by side, each on workers "
                 "of its own, and add them in order: for more workers than layers. [1]"),
    click.option("--out", metavar="URI", shell_complete=completion.folders,
                 help="Run directory. [runs/MODEL-METHOD-SIZE]"),
)  # fmt: skip
_MEASURING = (
    click.option("--evaluation", metavar="SRC", shell_complete=_SOURCE,
                 help=f"{SOURCES} [the evaluation split of embedded, stdlib or wikitext2]"),
    click.option("--evaluation-sequences", type=int, metavar="N",
                 help="How many. [all of a token file, all of wikitext2, 128 of other text]"),
    click.option("--sequence-length", type=int, metavar="T",
                 help="Tokens of each. [that of a token file; the model's longest, up to 2048]"),
    click.option("--seed", type=int, metavar="S", help="Of the choice of sequences. [0]"),
)  # fmt: skip
_STORE = click.option(
    "--model-store", metavar="DIR",
    help="A directory that links in MODEL's directory may lead into, such as a store of weights "
    "that is shared; every worker must see it. [none: links that leave it are refused]",
)  # fmt: skip
_MACHINES = (
    _STORE,
    click.option("--workers", type=int, metavar="N", help="Ray actors, each with a stage. [1]"),
    click.option("--threads", type=int, metavar="N",
                 help="CPU threads of each; other threads, other bits. [1]"),
    click.option("--address", metavar="ADDR", shell_complete=completion.of("local", "auto"),
                 help="local: a Ray for this command alone; auto or HOST:PORT: a cluster that "
                 "runs. [local]"),
    click.option("--device", metavar="NAME",
                 shell_complete=completion.of("auto", "cpu", "cuda"),
                 help="cpu or cuda. [cuda where a worker of the cluster, as it is or fully grown, "
                 "or this machine has a GPU]"),
    click.option("--worker-gib", type=float, metavar="GIB",
                 help="Memory the plan may give a worker. [its share of 80 % of this machine]"),
    click.option("--microbatch-tokens", type=int, metavar="N",
                 help="Tokens that a stage takes at a time; other cuts, other bits. [4096]"),
    click.option("-r", "--recipe", metavar="FILE.yaml", shell_complete=completion.recipes,
                 help="Any of these from a file, such as the run.yaml of a run, or a name from "
                 "`compress-cluster recipes ls`."),
)  # fmt: skip


_TERMS = (
    click.option("--price", type=click.FloatRange(min=0), metavar="P",
                 help="Of one worker for an hour, for the plan to say what a run costs."),
    click.option("--preemptions-per-hour", type=click.FloatRange(min=0), default=0.0, metavar="R",
                 help="How often one worker is taken away. [0]"),
)  # fmt: skip


def terms_options(command: Any) -> Any:
    """Add what workers cost and how long they last."""
    return _added(command, _TERMS)


def terms_of(given: dict[str, Any]) -> dict[str, float]:
    """Take what `terms_options` gave out of the options of a command; what was not given is out."""
    found = {name: given.pop(name) for name in ("price", "preemptions_per_hour")}
    return {name: value for name, value in found.items() if value}


def store_option(command: Any) -> Any:
    """Add where links in a model's directory may lead."""
    return _added(command, (_STORE,))


def recipe_options(command: Any) -> Any:
    """Add every option of a run."""
    return _added(command, (*_COMPRESSION, *_MEASURING, *_MACHINES))


def evaluation_options(command: Any) -> Any:
    """Add the options that measuring one model has a use for."""
    return _added(command, (*_MEASURING, *_MACHINES))


class RecipeCommand(click.Command):
    """A command whose help ends with the options of every method."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write method -> options with defaults."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Options of methods, for --option, with their defaults"):
            formatter.write_dl([
                (method, " ".join(f"{o.name}={typed(o.default)}" for o in options))
                for method, options in method_options().items()
            ])  # fmt: skip


def config_of(model: str | None, given: dict[str, Any]) -> Any:
    """Return the recipe that a command line asks for; ``given`` is what click parsed.

    Raises:
        ConfigError: an option is wrong, or the recipe file is.
    """
    from orchestrator.recipe.method_options import resolve_steps
    from orchestrator.recipe.reading import load_config

    options = {f"options.{key}": value for key, value in pairs_of(given.pop("options", ())).items()}
    recipe = given.pop("recipe")
    given["steps"] = [step_of(text) for text in given.pop("steps", ())] or None
    values = {KEYS.get(name, name): value for name, value in given.items()}
    config = load_config(recipe, {"model": model, **values, **options})
    if any(step.options for step in config.chain):
        known = method_options()
        resolve_steps(config, [Written(step.method, known[step.method]) for step in config.chain])
    return config


def step_of(text: str) -> dict[str, Any]:
    """Return the step that ``METHOD:F[:KEY=VALUE...]`` says; a colon is in no name and no value.

    Raises:
        ConfigError: the text is not of that form.
    """
    method, *parts = text.split(":")
    pairs = dict(part.partition("=")[::2] if "=" in part else ("keep_fraction", part)
                 for part in parts)  # fmt: skip
    sizes = {key: pairs.pop(key) for key in ("keep_fraction", "slice") if key in pairs}
    if not method or not sizes:
        raise ConfigError(
            f"--step {text}: must be METHOD:F, or METHOD:F:KEY=VALUE with more of the last",
            hint="such as --step modegpt:0.9:modules=mlp,vo, or --step slicegpt:slice=0.2",
        )
    try:
        return {"method": method, **{k: float(v) for k, v in sizes.items()}, "options": pairs}
    except ValueError as error:
        raise ConfigError(f"--step {text}: {', '.join(sizes.values())} is no number") from error


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
class Written:
    """A method and its options as they stand in its source."""

    name: str
    options: tuple[OptionSpec, ...]


def method_options() -> dict[str, tuple[OptionSpec, ...]]:
    """Return method -> options, as they stand in the sources.

    Importing a method takes seconds, for torch; help is there at once.
    """
    files = resources.files("actors.methods").iterdir()
    sources = {f.name.removesuffix(".py"): f for f in files if f.name.endswith(".py")}
    return {
        name: _options_in(sources[name].read_text(encoding="utf-8"))
        for name in sorted(sources)
        if not name.startswith("_")
    }


def _options_in(source: str) -> tuple[OptionSpec, ...]:
    """Return the ``options`` of a method's SPEC; they may name what it imports from planners."""
    tree = ast.parse(source)
    names = {
        alias.asname or alias.name: getattr(import_module(node.module), alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("planners.")
        for alias in node.names
    }
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    spec: Any = next(node.value for node in assigned if ast.unparse(node.targets[0]) == "SPEC")
    options = next(k.value for k in spec.keywords if k.arg == "options")
    found: tuple[OptionSpec, ...] = eval(compile(ast.Expression(options), "SPEC", "eval"), names)
    return found


def typed(value: Option) -> str:
    """Return a value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _added(command: Any, options: Sequence[Decorator]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
