"""The command line: parse, call, print. Everything heavy is imported inside the commands."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from actors.storage.quoting import require_utf8
from orchestrator.cli import completion
from orchestrator.cli.commands import COMMANDS
from orchestrator.cli.options import (
    RecipeCommand,
    config_of,
    evaluation_options,
    pairs_of,
    recipe_options,
    store_option,
    terms_options,
)
from orchestrator.report.console import echo, streams
from planners.errors import CompressionError, ConfigError

INTERRUPTED = 130
TREE = CompressionError.__module__
COUNT = click.IntRange(min=1)
as_json = click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="compress-cluster")
def cli() -> None:
    """Make a large language model smaller, without training, on a laptop or a cluster.

    \b
    compress-cluster run                            the model that comes with the package
    compress-cluster run DIR --keep-fraction 0.8    a Llama, Mistral or Qwen2 checkpoint
    compress-cluster run llama-2-7b --address auto --workers 8
    The same command again goes on where it stopped.
    """  # noqa: D301 click's mark for lines to leave as they are


@cli.command(cls=RecipeCommand)
@click.argument("model", required=False, shell_complete=completion.models)
@recipe_options
@click.option(
    "--stats",
    metavar="URI",
    shell_complete=completion.runs,
    help="Reuse the statistics that another run kept.",
)
@click.option(
    "--keep-statistics", is_flag=True, default=None, help="Keep stats/ at the end, for --stats."
)
@click.option(
    "--verify-hashes", is_flag=True, help="Compare the bytes of what is done, not only sizes."
)
@click.option("--dashboard", is_flag=True, help="Start Ray's dashboard with a local cluster.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, start nothing.")
@click.option("--yes", is_flag=True, help="Answer every question with yes.")
@click.option("--token-on-stdin", is_flag=True, hidden=True)
@terms_options
@as_json
def run(
    model: str | None, yes: bool, json_: bool, token_on_stdin: bool, **given: Any
) -> None:  # fmt: skip
    """Compress MODEL: a directory, a Hub id or an alias. None is tiny, which is embedded.

    The plan is shown first; on a cluster that may cost money it is asked about. The result is
    RUN/model. The same command again goes on where this one stopped.
    """
    how = {name: given.pop(name) for name in ("dashboard", "dry_run", "verify_hashes")}
    costs = {name: given.pop(name) for name in ("price", "preemptions_per_hour")}
    config = config_of(model, given)
    echo("reading the model and the text", err=True)  # what is imported next takes seconds
    terms = _terms(costs)
    if token_on_stdin:
        from actors.storage import hub

        hub.lend(sys.stdin.readline().strip())
    from orchestrator.cli import run as run_

    run_.run(config, terms, **how, yes=yes, json_=json_)


@cli.command(cls=RecipeCommand)
@click.argument("model", required=False, shell_complete=completion.models)
@recipe_options
@click.option(
    "--stats",
    metavar="URI",
    shell_complete=completion.runs,
    help="Reuse the statistics that another run kept.",
)
@click.option("--cluster", metavar="8xA100-80GB", help="Devices to plan for; needs no weights.")
@click.option("--measure", is_flag=True, help="Time a layer on this machine first, and keep it.")
@terms_options
@as_json
def plan(model: str | None, cluster: str | None, json_: bool, **given: Any) -> None:
    """Print what `run` would do with the same options; start nothing.

    The short names of Llama models, and any directory with a config.json and --cluster, need no
    weights: compress-cluster plan llama-2-70b --cluster 8xA100-80GB
    """
    costs = {name: given.pop(name) for name in ("price", "preemptions_per_hour", "measure")}
    config = config_of(model, given)  # first: what the next line imports takes seconds
    terms = _terms(costs)
    from orchestrator.cli import run as run_

    run_.plan(config, terms, cluster_text=cluster, json_=json_)


@cli.command("eval")
@click.argument("directory", shell_complete=completion.folders)
@evaluation_options
@as_json
def eval_(directory: str, json_: bool, **given: Any) -> None:
    """Measure the perplexity of a checkpoint, dense or compressed."""
    config = config_of(directory, given)
    from orchestrator.cli import evaluate

    evaluate.evaluate(config, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def report(run_uri: str, json_: bool) -> None:
    """Print the report of a RUN, and write its page again."""
    from orchestrator.cli import status as looks

    looks.report(run_uri, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def status(run_uri: str, json_: bool) -> None:
    """Say how far a RUN is, and who works on it."""
    from orchestrator.cli import status as looks

    looks.status(run_uri, json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@click.option(
    "--method",
    required=True,
    metavar="NAME,NAME",
    shell_complete=completion.methods,
    help="Methods to compare.",
)
@click.option("--keep-fraction", required=True, metavar="F,F,...", help="True fractions to keep.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the methods.",
    shell_complete=completion.options,
)
@click.option("--workers", type=int, help="Ray actors. [as in the run]")
@click.option("--address", help="Ray cluster. [as in the run]")
@as_json
def sweep(run_uri: str, json_: bool, **given: Any) -> None:
    """Try methods and sizes on the model of RUN, calibrating once."""
    names = given["method"].split(",")
    from actors.methods import require  # the modules of methods take seconds, and are left alone

    for name in names:
        require(name, where="--method")
    from orchestrator.cli import experiments

    experiments.sweep(
        run_uri,
        names=names,
        fractions=_numbers(given["keep_fraction"]),
        options=pairs_of(given["options"]),
        placement={k: given[k] for k in ("workers", "address") if given[k] is not None},
        json_=json_,
    )


@cli.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@click.option(
    "--point",
    required=True,
    metavar="P",
    shell_complete=completion.points,
    help="A name of the sweep's table.",
)
@click.option("--yes", is_flag=True, help="Answer every question with yes.")
@terms_options
@as_json
def export(run_uri: str, point: str, yes: bool, json_: bool, **given: Any) -> None:
    """Finish one point of the sweep of RUN: verify, time, mark READY."""
    terms = _terms(given)
    from orchestrator.cli import experiments

    experiments.export(run_uri, point, terms, yes=yes, json_=json_)


@cli.command()
@click.argument("directory", shell_complete=completion.folders)
@store_option
@as_json
def verify(directory: str, model_store: str | None, json_: bool) -> None:
    """Check a run or a model: bytes, loading, generation."""
    from orchestrator.cli import evaluate

    evaluate.verify(directory, model_store=model_store or "", json_=json_)


@cli.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@click.option("--layers", required=True, metavar="17,20-22", help="Layers to make again.")
@click.option(
    "--option", "options", multiple=True, metavar="KEY=VALUE", help="Of the method, for these only."
)
@click.option("--workers", type=int, help="Ray actors. [as in the run]")
@click.option("--address", help="Ray cluster. [as in the run]")
@click.option("--yes", is_flag=True, help="Answer every question with yes.")
@terms_options
@as_json
def redo(run_uri: str, layers: str, yes: bool, json_: bool, **given: Any) -> None:
    """Make some layers of RUN again, with another option if one is given.

    The run is READY again once the result has proved itself again.
    """
    terms = _terms(given)
    from orchestrator.cli import run as run_

    run_.redo(
        run_uri,
        terms,
        layers=layers,
        options=pairs_of(given["options"]),
        placement={k: given[k] for k in ("workers", "address") if given[k] is not None},
        yes=yes,
        json_=json_,
    )


@cli.command()
@click.argument("run_a", shell_complete=completion.runs)
@click.argument("run_b", shell_complete=completion.runs)
@click.option("--details", is_flag=True, help="Every difference, of each layer too.")
@as_json
def diff(run_a: str, run_b: str, details: bool, json_: bool) -> None:
    """Say in what two runs differ: results, recipe, data, versions, layers."""
    from orchestrator.cli import diff as diff_screen

    diff_screen.diff(run_a, run_b, details=details, json_=json_)


@cli.command()
@click.argument("directories", nargs=-1, required=True, shell_complete=completion.folders)
@click.option("--prompt", type=COUNT, default=128, show_default=True, help="Tokens of each prompt.")
@click.option("--batch", "batches", type=COUNT, multiple=True, help="Batch sizes. [1 and 8]")
@click.option(
    "--new-tokens", type=COUNT, default=32, show_default=True, help="Tokens generated for each."
)
@click.option(
    "--threads", type=COUNT, default=1, show_default=True, help="CPU threads of each worker."
)
@click.option(
    "--workers",
    type=COUNT,
    default=1,
    show_default=True,
    help="Over which a model goes that does not fit one.",
)
@click.option(
    "--worker-gib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of each. [its share of this machine, or its device]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where they generate.",
)
@store_option
@as_json
def bench(directories: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Time models side by side: prefill, decode, memory."""
    from orchestrator.cli import evaluate

    given["batches"] = given["batches"] or (1, 8)
    given["model_store"] = given["model_store"] or ""
    evaluate.bench(directories, json_=json_, **given)


@cli.group()
def stats() -> None:
    """Look at the statistics that a run kept.

    `run --keep-statistics` keeps them; `run --stats RUN` uses them for another run.
    """


@stats.command("ls")
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def stats_ls(run_uri: str, json_: bool) -> None:
    """List the layers: taps, tokens, bytes."""
    _statistics("ls", run_uri, json_=json_)


@stats.command("show")
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def stats_show(run_uri: str, json_: bool) -> None:
    """Say what they are of: model revision, data, sequence length, dtype, taps."""
    _statistics("show", run_uri, json_=json_)


@stats.command("verify")
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def stats_verify(run_uri: str, json_: bool) -> None:
    """Compare every file with its record, and see that its sums can be sums."""
    _statistics("verify", run_uri, json_=json_)


@cli.command()
@as_json
def methods(json_: bool) -> None:
    """List the methods, their options and defaults."""
    from orchestrator.cli import listings

    listings.methods(json_=json_)


for _command in COMMANDS:
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with the exit code of what happened."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with streams():
        _invoke(arguments)


def _invoke(arguments: list[str]) -> None:
    json_ = "--json" in arguments
    try:
        _require_names(arguments)
        cli.main(arguments, prog_name="compress-cluster", standalone_mode=False)
    except CompressionError as error:
        said = [_as_given(text, arguments) for text in (str(error), error.hint)]
        # What a module raises for itself is called as the tree of errors calls it.
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == TREE]
        _complain(kinds[0], *said, json_=json_)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        asked = getattr(error, "ctx", None)
        hint = f"see {asked.command_path if asked else 'compress-cluster'} --help"
        _complain("ConfigError", error.format_message(), hint, json_=json_)
        sys.exit(ConfigError.exit_code)
    except (KeyboardInterrupt, click.Abort):
        resume = f"to go on: {shlex.join(['compress-cluster', *arguments])}"
        _complain("Interrupted", "what is done is kept", resume, json_=json_)
        sys.stdout.flush()
        sys.stderr.flush()
        # Ctrl-C went to Ray's processes too: on its way out Ray would make another code of this.
        os._exit(INTERRUPTED)


def _require_names(arguments: list[str]) -> None:
    """Refuse names that no recipe, journal or report could hold: those are UTF-8.

    Raises:
        ConfigError: an argument is not UTF-8, or the locale has no letters for it.
    """
    for word in arguments:
        require_utf8(word, ConfigError)
        names = sys.getfilesystemencoding()
        if not word.isascii() and names != "utf-8":
            raise ConfigError(
                f"{os.fsencode(word).decode()}: cannot be named in this locale, which is {names}",
                hint="set PYTHONUTF8=1, or a UTF-8 locale: LC_ALL=C.UTF-8",
            )


def _statistics(action: str, run_uri: str, *, json_: bool) -> None:
    from orchestrator.cli import listings

    listings.statistics(action, run_uri, json_=json_)


def _terms(given: dict[str, Any]) -> Any:
    """Take what workers cost out of the options, and return it."""
    from orchestrator.forecast.terms import Pricing

    price, losses = given.pop("price"), given.pop("preemptions_per_hour")
    measured = given.pop("measure", False)
    return Pricing(price_per_hour=price, preemptions_per_hour=losses, measure=measured)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--keep-fraction {text}: must be numbers with commas") from error


def _as_given(text: str, arguments: list[str]) -> str:
    """Return a message with the paths below this directory as they were typed: relative to it."""
    here = f"{Path.cwd()}/"
    return text if any(here in word for word in arguments) else text.replace(here, "")


def _complain(kind: str, message: str, hint: str, *, json_: bool) -> None:
    if json_:
        error = {"class": kind, "message": message, "hint": hint}
        echo(json.dumps({"error": error}))
    echo(f"{kind}: {message}", err=True)
    if hint:
        echo(f"  {hint}", err=True)
