"""The commands that work on models and runs: they parse, and call a module that does the work.

Imports that take long are inside the functions.
"""

import sys
from typing import Any

import click

from orchestrator.cli import completion
from orchestrator.cli.options import (
    RecipeCommand,
    as_json,
    config_of,
    model_argument,
    pairs_of,
    placement,
    placement_of,
    pricing,
    recipe_file,
    run_argument,
    terms,
    yes,
)
from orchestrator.cli.output import echo, stdout
from planners.errors import ConfigError

COUNT = click.IntRange(min=1)
# Keys of a recipe that are used to measure one model.
MEASURING = (
    "evaluation.source", "evaluation.sequences", "calibration.sequence_length", "seed",
    "model_store", "workers", "threads", "address", "device", "worker_gib",
    "calibration.microbatch_tokens",
)  # fmt: skip


@click.command(cls=RecipeCommand)
@model_argument
@recipe_file
@click.option(
    "--verify-hashes",
    is_flag=True,
    help="On resume, check hashes of finished files, not only sizes.",
)
@click.option("--dashboard", is_flag=True, help="Start Ray's dashboard (local cluster).")
@click.option("--dry-run", is_flag=True, help="Validate, print the plan, start nothing.")
@yes
@click.option("--token-on-stdin", is_flag=True, hidden=True)
@terms
@as_json
def run(
    model: str | None, yes: bool, json_: bool, token_on_stdin: bool, **given: Any
) -> None:  # fmt: skip
    """Compress MODEL: a directory, Hub id or alias.

    Shows the plan first, and asks before using a cluster that may cost money. The result is
    RUN/model. The same command resumes an interrupted run.
    """
    dashboard, dry_run = given.pop("dashboard"), given.pop("dry_run")
    hashes = given.pop("verify_hashes")
    prices = pricing(given)
    config = config_of(model, given)
    from actors.storage.sources import source_here

    source = source_here(config.model)  # before what takes seconds: the name may be misspelt
    echo("reading the model and the data", err=True)  # what is imported next takes seconds
    if token_on_stdin:
        from actors.storage import hub

        hub.lend(sys.stdin.readline().strip())
    if dry_run:
        from orchestrator.cli.run import show_plan

        show_plan(config, prices, json_=json_)
        return
    from orchestrator.cli.ahead import cluster_for

    with cluster_for(
        config, source, dashboard=dashboard, modules="orchestrator.cli.run"
    ) as connect:
        from orchestrator.cli.run import run

        run(config, prices, connect=connect, verify_hashes=hashes, yes=yes, json_=json_)


@click.command(cls=RecipeCommand)
@model_argument
@recipe_file
@click.option("--cluster", metavar="8xA100-80GB", help="Devices to plan for; needs no weights.")
@click.option(
    "--measure", is_flag=True, help="Time a layer on this machine first; the result is kept."
)
@terms
@as_json
def plan(model: str | None, cluster: str | None, json_: bool, **given: Any) -> None:
    """Print the plan of a run; start nothing.

    The short names of Llama models, and any directory with a config.json and --cluster, need no
    weights: compress-cluster plan llama-2-70b --cluster 8xA100-80GB
    """
    prices = pricing(given)
    config = config_of(model, given)  # first: what the next line imports takes seconds
    from orchestrator.cli.run import plan

    plan(config, prices, cluster_text=cluster, json_=json_)


@click.command("eval", cls=RecipeCommand, keys=MEASURING)
@click.argument("directory", shell_complete=completion.folders)
@recipe_file
@as_json
def eval_(directory: str, json_: bool, **given: Any) -> None:
    """Measure the perplexity of a checkpoint, dense or compressed."""
    config = config_of(directory, given)
    from orchestrator.cli.evaluate import evaluate

    evaluate(config, json_=json_)


@click.command()
@run_argument
@as_json
def report(run_uri: str, json_: bool) -> None:
    """Print the report of RUN; rewrite its page."""
    from orchestrator.cli.status import report

    report(run_uri, json_=json_)


@click.command()
@run_argument
@as_json
def status(run_uri: str, json_: bool) -> None:
    """Show the progress of RUN, and its driver."""
    from orchestrator.cli.status import status

    status(run_uri, json_=json_)


@click.command()
@run_argument
@click.option(
    "--price", type=float, default=0.0, metavar="P", help="Price of one worker for one hour."
)
@click.option("--once", is_flag=True, help="Print the status once and exit.")
def watch(run_uri: str, price: float, once: bool) -> None:
    """Follow RUN live, from anywhere with access to its directory.

    \b
    compress-cluster watch s3://BUCKET/runs/llama-2-70b --price 1.1
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.remote.watch import watch

    watch(run_uri, stdout, price=price, once=once)


@click.command()
@run_argument
@click.option(
    "--method",
    metavar="NAME,NAME",
    shell_complete=completion.methods,
    help="Methods to compare.",
)
@click.option("--keep-fraction", metavar="F,F,...", help="Sizes: true fractions to keep.")
@click.option(
    "--keep-bytes", metavar="SIZE,SIZE", help="Sizes: bytes of the weights as stored, such as 4GB."
)
@click.option("--bits", metavar="B,B,...", help="Sizes: mean bits of a weight of the linears.")
@click.option(
    "--uniform",
    metavar="B/G,B/G",
    help="Also GPTQ with one number of bits and one group everywhere, such as 3/32,4/128: the "
    "curve to beat.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of what is not quantised.  [that of the run]",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Option of the methods; may be repeated.",
    shell_complete=completion.options,
)
@placement
@as_json
def sweep(run_uri: str, json_: bool, **given: Any) -> None:
    """Compare methods and sizes on one calibration.

    \b
    compress-cluster sweep RUN --method modegpt,svdllm --keep-fraction 0.9,0.8
    compress-cluster sweep RUN --method modegpt --keep-bytes 3GB,4GB --uniform 3/128,4/128
    """  # noqa: D301 click's mark for lines to leave as they are
    names, sizes = _listed(given["method"]), _sizes(given)
    uniform = _listed(given["uniform"])
    if bool(names) != bool(sizes) or not (names or uniform):
        raise ConfigError(
            "sweep: give --method with one of --keep-fraction, --keep-bytes and --bits, or "
            "--uniform, or both",
            hint="such as --method modegpt --keep-bytes 3GB,4GB --uniform 3/128,4/128",
        )
    from actors.methods import require  # the modules of methods take seconds, and are left alone

    for name in names:
        require(name, where="--method")
    from orchestrator.cli.experiments import sweep

    sweep(
        run_uri,
        {
            "names": names,
            "sizes": sizes,
            "uniform": uniform,
            "options": pairs_of(given["options"]),
            "dtype": given["dtype"] or "",
        },
        placement=placement_of(given),
        json_=json_,
    )


@click.command()
@run_argument
@click.option(
    "--point",
    metavar="P",
    shell_complete=completion.points,
    help="Name of a point in the table of the sweep.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["deci"]),
    help="Write the result again: deci has FFN widths by layer for vLLM and llama.cpp.",
)
@click.option("--out", metavar="DIR", help="Directory for --format.  [RUN/deci]")
@yes
@terms
@as_json
def export(
    run_uri: str,
    point: str | None,
    form: str | None,
    out: str | None,
    yes: bool,
    json_: bool,
    **given: Any,
) -> None:
    """Make a sweep's point a READY run; write a result as deci."""
    if (point is None) == (form is None):
        raise ConfigError(
            "export: give --point or --format",
            hint="--point P finishes a point of a sweep; --format deci writes the result of a "
            "READY run again",
        )
    if form is not None:
        from orchestrator.cli.deci import export_deci

        export_deci(run_uri, out or "", json_=json_)
        return
    if out is not None:
        raise ConfigError("--out: is for --format; a point of a sweep is finished where it is")
    from orchestrator.cli.experiments import export

    assert point is not None
    export(run_uri, point, pricing(given), yes=yes, json_=json_)


@click.command()
@click.argument("file", metavar="FILE", shell_complete=completion.files)
@click.option("--dry-run", is_flag=True, help="Check every entry, print the runs, start nothing.")
@yes
@as_json
def batch(file: str, dry_run: bool, yes: bool, json_: bool) -> None:
    """Run models x methods x sizes, calibrating each model once.

    Checks every entry before the first run starts, and shows the forecast of all; asks once before
    using a cluster that may cost money, unless the file has a budget. The same command resumes.

    \b
    out: s3://BUCKET/batches/august
    budget: {money: 40, price_per_worker_hour: 1.1}      # or {hours: 6}
    defaults: {address: auto, workers: 8}
    runs:
      - model: [llama-2-7b, llama-2-13b]
        method: [slicegpt, modegpt]
        keep_fraction: [0.9, 0.8, 0.7]
        priority: 1
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.cli.experiments import batch

    batch(file, dry_run=dry_run, yes=yes, json_=json_)


@click.command(cls=RecipeCommand, keys=("model_store",))
@click.argument("directory", shell_complete=completion.folders)
@as_json
def verify(directory: str, model_store: str | None, json_: bool) -> None:
    """Check a run or a model: bytes, loading, generation."""
    from orchestrator.cli.evaluate import verify

    verify(directory, model_store=model_store or "", json_=json_)


@click.command()
@run_argument
@click.option("--layers", required=True, metavar="17,20-22", help="Layers to recompute.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Method option for these layers.",
)
@placement
@yes
@terms
@as_json
def redo(run_uri: str, layers: str, yes: bool, json_: bool, **given: Any) -> None:
    """Recompute some layers of RUN, with new options.

    The run is READY again once the result has been verified.
    """
    from orchestrator.cli.run import redo

    redo(
        run_uri,
        pricing(given),
        layers=layers,
        options=pairs_of(given["options"]),
        placement=placement_of(given),
        yes=yes,
        json_=json_,
    )


@click.command()
@click.argument("run_a", shell_complete=completion.runs)
@click.argument("run_b", shell_complete=completion.runs)
@click.option("--details", is_flag=True, help="Every difference, layer by layer.")
@as_json
def diff(run_a: str, run_b: str, details: bool, json_: bool) -> None:
    """Compare two runs: results, recipe, data, versions, layers."""
    from orchestrator.cli.diff import diff

    diff(run_a, run_b, details=details, json_=json_)


@click.command(cls=RecipeCommand, keys=("model_store",))
@click.argument("directories", nargs=-1, required=True, shell_complete=completion.folders)
@click.option("--prompt", type=COUNT, default=128, show_default=True, help="Tokens of each prompt.")
@click.option(
    "--batch", "batches", type=COUNT, multiple=True, help="Batch sizes. [1, 16, most that fit]"
)
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
    help="Workers over which a model is spread if it does not fit one.",
)
@click.option(
    "--worker-gib",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="Memory of a worker. [its share of this machine, or its device]",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to generate on.",
)
@click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Also decode with torch.compile and a static cache.",
)
@as_json
def bench(directories: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Time models side by side: prefill, decode, memory.

    Models take turns until the ratio to the first one is steady. A verdict is `faster` or `slower`
    if the 95 % interval of the median ratio excludes 1, and else `too noisy to say`.
    """
    from orchestrator.cli.evaluate import bench

    given["model_store"] = given["model_store"] or ""
    bench(directories, json_=json_, **given)


def _listed(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _sizes(given: dict[str, Any]) -> list[tuple[str, float | str]]:
    """Return the sizes of a sweep, each the key of a recipe and its value.

    Raises:
        ConfigError: sizes of two kinds are given, or one is not a number.
    """
    kinds = [key for key in ("keep_fraction", "keep_bytes", "bits") if given[key]]
    if len(kinds) > 1:
        options = ", ".join(f"--{key.replace('_', '-')}" for key in kinds)
        raise ConfigError(f"{options}: give only one of them; each sets the sizes")
    return [
        (key, part if key == "keep_bytes" else _number(key, part))
        for key in kinds
        for part in _listed(given[key])
    ]


def _number(key: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(
            f"--{key.replace('_', '-')} {text}: must be numbers separated by commas"
        ) from error


ALL = (
    run, plan, eval_, report, status, watch, sweep, export, batch, verify, redo, diff, bench,
)  # fmt: skip
