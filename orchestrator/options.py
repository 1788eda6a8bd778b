"""The options that make a recipe; each is one key of it, and what is not given stays open."""

import ast
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import click

from planners.plan import Option

Decorator = Callable[[Any], Any]

KEYS = {
    "slice_": "slice",
    "calibration": "calibration.source",
    "calibration_sequences": "calibration.sequences",
    "sequence_length": "calibration.sequence_length",
    "microbatch_tokens": "calibration.microbatch_tokens",
    "evaluation": "evaluation.source",
    "evaluation_sequences": "evaluation.sequences",
}
SOURCES = "stdlib, wikitext2, a .txt, .jsonl or .parquet file, or tokens:FILE.safetensors."

_COMPRESSION = (
    click.option("--method", metavar="NAME", help="How layers shrink. [slicegpt]"),
    click.option("--keep-fraction", type=float, metavar="F",
                 help="Parameters after / before, true counts, embeddings included. [0.8]"),
    click.option("--slice", "slice_", type=float, metavar="F",
                 help="In place of --keep-fraction: SliceGPT's nominal fraction of the width to "
                 "remove; removes fewer parameters than it says."),
    click.option("--option", "options", multiple=True, metavar="KEY=VALUE",
                 help="Of the method; those there are stand below. May be repeated."),
    click.option("--calibration", metavar="SRC",
                 help=f"{SOURCES} [the tokens that come with tiny; stdlib for other models]"),
    click.option("--calibration-sequences", type=int, metavar="N",
                 help="[all of a token file, 128 of text]"),
    click.option("--calibration-dtype", metavar="DTYPE",
                 help="float32, bfloat16 or float16. [float32 on a CPU, else the model's own]"),
    click.option("--out", metavar="URI", help="Run directory. [runs/MODEL-METHOD-SIZE]"),
)  # fmt: skip
_MEASURING = (
    click.option("--evaluation", metavar="SRC",
                 help="As for --calibration; text that has no split for it needs its own file."),
    click.option("--evaluation-sequences", type=int, metavar="N",
                 help="[all of a token file, all of wikitext2, 128 of other text]"),
    click.option("--sequence-length", type=int, metavar="T",
                 help="Tokens of each. [that of a token file; the model's longest, up to 2048]"),
    click.option("--seed", type=int, metavar="S", help="Of the choice of sequences. [0]"),
)  # fmt: skip
_MACHINES = (
    click.option("--workers", type=int, metavar="N", help="Ray actors, each with a stage. [1]"),
    click.option("--threads", type=int, metavar="N",
                 help="CPU threads of each; other threads, other bits. [1]"),
    click.option("--address", metavar="ADDR",
                 help="local: a Ray for this command alone; auto or HOST:PORT: a cluster that "
                 "runs. [local]"),
    click.option("--device", metavar="NAME",
                 help="cpu or cuda. [cuda on a cluster and where this machine has it]"),
    click.option("--worker-gib", type=float, metavar="GIB",
                 help="Memory the plan may give a worker. [its share of 80 % of this machine]"),
    click.option("--microbatch-tokens", type=int, metavar="N",
                 help="Tokens that a stage takes at a time; other cuts, other bits. [4096]"),
    click.option("-r", "--recipe", metavar="FILE.yaml",
                 help="Any of these from a file, such as the run.yaml of a run."),
)  # fmt: skip


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
                (method, " ".join(f"{name}={_typed(value)}" for name, value in options.items()))
                for method, options in method_options().items()
            ])  # fmt: skip


def method_options() -> dict[str, dict[str, Option]]:
    """Return method -> option -> default, as they stand in the sources.

    Importing a method takes seconds, for torch; help is there at once.
    """
    folder = resources.files("actors.methods")
    sources = {f.name.removesuffix(".py"): f for f in folder.iterdir() if f.name.endswith(".py")}
    return {
        name: dict(
            _name_and_default(node)
            for node in ast.walk(ast.parse(sources[name].read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "OptionSpec"
        )
        for name in sorted(sources)
        if not name.startswith("_")
    }


def _name_and_default(call: ast.Call) -> tuple[str, Option]:
    given = {k.arg: k.value for k in call.keywords}
    return ast.literal_eval(given["name"]), ast.literal_eval(given["default"])


def _typed(value: Option) -> str:
    """Return a value as it is typed on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _added(command: Any, options: Sequence[Decorator]) -> Any:
    for option in reversed(options):
        command = option(command)
    return command
