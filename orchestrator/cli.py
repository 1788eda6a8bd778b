"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from planners.errors import CompressionError, ConfigError

INTERRUPTED = 130
Command = Callable[..., None]


def recipe_options(command: Command) -> Command:
    """Add the options that make a recipe; their names are the recipe's keys."""
    for option in reversed(RECIPE_OPTIONS):
        command = option(command)
    return command


RECIPE_OPTIONS = [
    click.option("--method", help="slicegpt, ...; see --help-methods."),
    click.option("--keep-fraction", type=float, help="True parameters kept, 0 to 1. [0.8]"),
    click.option("--slice", "slice_", type=float, help="SliceGPT's nominal fraction to remove."),
    click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the method."),
    click.option("--calibration", metavar="SRC", help="stdlib, wikitext2, FILE, tokens:FILE."),
    click.option("--calibration-sequences", type=int, metavar="N"),
    click.option("--sequence-length", type=int, metavar="T"),
    click.option("--evaluation", metavar="SRC", help="As for --calibration."),
    click.option("--evaluation-sequences", type=int, metavar="N"),
    click.option("--calibration-dtype", help="float32, bfloat16 or float16. [float32 on a CPU]"),
    click.option("--microbatch-tokens", type=int, help="Tokens a stage takes at a time. [4096]"),
    click.option("--workers", type=int, help="Ray actors. [1]"),
    click.option("--threads", type=int, help="CPU threads of each. [1]"),
    click.option("--device", help="cpu or cuda. [cuda where there is one]"),
    click.option("--worker-gib", type=float, help="Memory of a worker. [what the machine has]"),
    click.option("--address", help="Ray cluster; local starts one for this command. [local]"),
    click.option("--seed", type=int, help="Of the choice of sequences. [0]"),
    click.option("--out", metavar="URI", help="Run directory. [runs/MODEL-METHOD-SIZE]"),
    click.option("-r", "--recipe", metavar="RECIPE.yaml", help="All of this from a file."),
]
KEYS = {
    "slice_": "slice",
    "calibration": "calibration.source",
    "calibration_sequences": "calibration.sequences",
    "sequence_length": "calibration.sequence_length",
    "microbatch_tokens": "calibration.microbatch_tokens",
    "evaluation": "evaluation.source",
    "evaluation_sequences": "evaluation.sequences",
}
as_json = click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="compress-cluster")
def cli() -> None:
    """Make a large language model smaller, without training, on a laptop or a cluster.

    \b
    compress-cluster run                                the embedded model, a minute on a laptop
    compress-cluster run DIR --keep-fraction 0.8        any Llama, Mistral or Qwen2 checkpoint
    compress-cluster run llama-2-7b --slice 0.25 --address auto --workers 8
    The same command again goes on where it stopped.
    """  # noqa: D301 click's mark for lines to leave as they are


@cli.command()
@click.argument("model", required=False)
@recipe_options
@click.option("--stats", metavar="URI", help="Reuse the statistics that another run kept.")
@click.option(
    "--keep-statistics", is_flag=True, default=None, help="Do not drop stats/ at the end."
)
@click.option("--dashboard", is_flag=True, help="Start Ray's dashboard with a local cluster.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, start nothing.")
@click.option("--yes", is_flag=True, help="Do not ask before a cluster that costs money.")
@as_json
def run(
    model: str | None, dashboard: bool, dry_run: bool, yes: bool, json_: bool, **given: Any
) -> None:  # fmt: skip
    """Compress MODEL: a directory, a Hub id or an alias; none is the embedded tiny model.

    Method options and their defaults are printed by `compress-cluster methods`.
    """
    del yes  # nothing here costs money unless --address names a cluster that is already running
    config = _config(model, given)
    from orchestrator import screens

    screens.run(config, dashboard=dashboard, dry_run=dry_run, json_=json_)


@cli.command()
@click.argument("model", required=False)
@recipe_options
@click.option("--cluster", metavar="8xA100-80GB", help="Devices to plan for; needs no weights.")
@as_json
def plan(model: str | None, cluster: str | None, json_: bool, **given: Any) -> None:
    """Print what a run would do: stages, waves, widths, bytes, operations. Nothing is started.

    The short names of Llama models, and any directory with a config.json and --cluster, need no
    weights: compress-cluster plan llama-2-70b --cluster 8xA100-80GB
    """
    config = _config(model, given)
    from orchestrator import screens

    screens.plan(config, cluster_text=cluster, json_=json_)


@cli.command("eval")
@click.argument("directory")
@recipe_options
@as_json
def eval_(directory: str, json_: bool, **given: Any) -> None:
    """Measure the perplexity of the checkpoint in DIRECTORY, dense or compressed."""
    config = _config(directory, given)
    from orchestrator import screens

    screens.evaluate(config, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN")
@as_json
def report(run_uri: str, json_: bool) -> None:
    """Show the report of a finished RUN, and write its page again."""
    from orchestrator import screens

    screens.report(run_uri, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN")
@as_json
def status(run_uri: str, json_: bool) -> None:
    """Say how far a RUN is, and who works on it."""
    from orchestrator import screens

    screens.status(run_uri, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--method", required=True, metavar="NAME,NAME", help="Methods to compare.")
@click.option("--keep-fraction", required=True, metavar="F,F,...", help="True fractions to keep.")
@click.option("--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the methods.")
@click.option("--workers", type=int, help="Ray actors. [as in the run]")
@click.option("--address", help="Ray cluster. [as in the run]")
@as_json
def sweep(run_uri: str, json_: bool, **given: Any) -> None:
    """Make and measure every METHOD at every size from one calibration of the model of RUN."""
    from orchestrator import screens

    screens.sweep(
        run_uri,
        names=given["method"].split(","),
        fractions=_numbers(given["keep_fraction"]),
        options=_pairs(given["options"]),
        placement={k: given[k] for k in ("workers", "address") if given[k] is not None},
        json_=json_,
    )


@cli.command()
@click.argument("run_uri", metavar="RUN")
@click.option("--point", required=True, metavar="P", help="A name of the sweep's table.")
@as_json
def export(run_uri: str, point: str, json_: bool) -> None:
    """Verify one POINT of the sweep of RUN, time it and mark it READY."""
    from orchestrator import screens

    screens.export(run_uri, point, json_=json_)


@cli.command()
@click.argument("directory")
@as_json
def verify(directory: str, json_: bool) -> None:
    """Check a run or a model: bytes against records, reload, generate with and without cache."""
    from orchestrator import screens

    screens.verify(directory, json_=json_)


@cli.command()
@click.argument("directories", nargs=-1, required=True)
@click.option("--prompt", default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--batch", "batches", type=int, multiple=True, help="Batch sizes. [1 and 8]")
@click.option("--new-tokens", default=32, show_default=True, help="Tokens generated for each.")
@click.option("--threads", default=1, show_default=True, help="CPU threads.")
@as_json
def bench(directories: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Time DIRECTORIES, dense and compressed side by side: prefill, decode, memory."""
    from orchestrator import screens

    given["batches"] = given["batches"] or (1, 8)
    screens.bench(list(directories), json_=json_, **given)


@cli.command()
@as_json
def methods(json_: bool) -> None:
    """List the methods, their options and defaults."""
    from orchestrator import screens

    screens.methods(json_=json_)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with the exit code of what happened."""
    arguments = sys.argv[1:] if arguments is None else arguments
    json_ = "--json" in arguments
    try:
        cli.main(arguments, prog_name="compress-cluster", standalone_mode=False)
    except CompressionError as error:
        _complain(type(error).__name__, str(error), error.hint, json_=json_)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        hint = "compress-cluster --help lists what there is"
        _complain("ConfigError", error.format_message(), hint, json_=json_)
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        words = "interrupted; what is done is kept"
        resume = "to go on, run the same command again: compress-cluster " + " ".join(arguments)
        _complain("Interrupted", words, resume, json_=json_)
        sys.exit(INTERRUPTED)


def _config(model: str | None, given: dict[str, Any]) -> Any:
    from orchestrator.config import load_config

    options = {f"options.{key}": value for key, value in _pairs(given.pop("options")).items()}
    recipe = given.pop("recipe")
    values = {KEYS.get(name, name): value for name, value in given.items()}
    return load_config(recipe, {"model": model, **values, **options})


def _pairs(options: tuple[str, ...]) -> dict[str, str]:
    for pair in options:
        if "=" not in pair:
            raise ConfigError(f"--option {pair}: must be KEY=VALUE")
    return dict(pair.split("=", 1) for pair in options)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep-fraction {text}: must be numbers with commas") from error


def _complain(kind: str, message: str, hint: str, *, json_: bool) -> None:
    if json_:
        error = {"class": kind, "message": message, "hint": hint}
        click.echo(json.dumps({"error": error}))
    click.echo(f"{kind}: {message}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
