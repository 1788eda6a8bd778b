"""The commands about clusters, jobs, batches and first contact; parse, call, print."""

import sys
from typing import Any

import click

from orchestrator.backend.cloud_notices import METADATA
from orchestrator.cli import completion
from orchestrator.cli.options import (
    RecipeCommand,
    config_of,
    recipe_options,
    terms_of,
    terms_options,
)
from orchestrator.report.console import echo
from planners.errors import CompressionError

as_json = click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")


@click.group()
def cluster() -> None:
    """Look at a cluster file before a machine is rented."""


@cluster.command("lint")
@click.argument("file", metavar="FILE", shell_complete=completion.files)
@as_json
def cluster_lint(file: str, json_: bool) -> None:
    """Say what is wrong in a cluster file of Ray or SkyPilot that their own check does not see.

    \b
    compress-cluster cluster lint cluster.yaml
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.cli import checks

    checks.cluster_file(file, json_=json_)


@click.command(cls=RecipeCommand)
@click.argument("model", required=False, shell_complete=completion.models)
@recipe_options
@click.option(
    "--stats",
    metavar="URI",
    shell_complete=completion.runs,
    help="Reuse the statistics that another run kept.",
)
@click.option("--keep-statistics", is_flag=True, default=None, help="Keep stats/ at the end.")
@click.option(
    "--to",
    metavar="URL",
    default="http://127.0.0.1:8265",
    show_default=True,
    envvar="RAY_API_SERVER_ADDRESS",
    help="Dashboard of the cluster; `ray dashboard cluster.yaml` tunnels it to this one.",
)
@click.option(
    "--keep-alive",
    type=click.IntRange(0, 100),
    default=0,
    metavar="N",
    help="Start a driver that was killed up to N times again. [0]",
)
@terms_options
@as_json
def submit(model: str | None, to: str, keep_alive: int, json_: bool, **given: Any) -> None:
    """Send a run to a cluster and come back; takes the options of `run`.

    From then on RUN is enough: status, watch, logs and cancel find the job by it.

    \b
    ray dashboard cluster.yaml &
    compress-cluster submit llama-2-70b --workers 8 --out s3://BUCKET/runs/llama-2-70b
    compress-cluster logs s3://BUCKET/runs/llama-2-70b --follow
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.cli import jobs

    terms = terms_of(given)
    jobs.submit(config_of(model, given), address=to, tries=keep_alive + 1, terms=terms, json_=json_)


@click.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends.")
def logs(run_uri: str, follow: bool) -> None:
    """Print what the job of a submitted RUN printed."""
    from orchestrator.cli import jobs

    jobs.logs(run_uri, follow=follow)


@click.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@as_json
def cancel(run_uri: str, json_: bool) -> None:
    """Stop the job of a submitted RUN; what is done is kept, and submit goes on with it."""
    from orchestrator.cli import jobs

    jobs.cancel(run_uri, json_=json_)


@click.command()
@click.argument("file", metavar="FILE", shell_complete=completion.files)
@click.option("--dry-run", is_flag=True, help="Check every entry, print the runs, start nothing.")
@click.option("--yes", is_flag=True, help="Answer every question with yes.")
@as_json
def batch(file: str, dry_run: bool, yes: bool, json_: bool) -> None:
    """Do many runs as one: models x methods x sizes, each model calibrated once.

    Every entry is checked before the first run starts, and what all of them come to is shown; on a
    cluster that may cost money it is asked about, once, unless the budget says how much.
    The same command again goes on.

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
    from orchestrator.cli import experiments

    experiments.batch(file, dry_run=dry_run, yes=yes, json_=json_)


@click.command()
@click.argument("run_uri", metavar="RUN", shell_complete=completion.runs)
@click.option("--price", type=float, default=0.0, metavar="P", help="Of a worker for an hour.")
@click.option("--once", is_flag=True, help="Print one screen and leave.")
def watch(run_uri: str, price: float, once: bool) -> None:
    """Follow a RUN live, from anywhere that can read its directory, s3:// and gs:// too.

    \b
    compress-cluster watch s3://BUCKET/runs/llama-2-70b --price 1.1
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.remote import watch as follow

    follow.watch(run_uri, price=price, once=once)


@click.command()
@click.option("--out", default="runs", show_default=True, help="Where runs are to go.")
@click.option("--offline", is_flag=True, help="Ask nobody.")
@as_json
def doctor(out: str, offline: bool, json_: bool) -> None:
    """Look at this machine, and say what to put right before a run finds out.

    \b
    compress-cluster doctor --out s3://BUCKET/runs
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.cli import checks

    checks.machine(out, offline=offline, json_=json_)


@click.group()
def data() -> None:
    """Look at a text before any device does."""


@data.command("lint")
@click.argument(
    "sources", metavar="SRC...", nargs=-1, required=True, shell_complete=completion.files
)
@click.option("--evaluation", default="", metavar="SRC", help="Text that must not be in SRC.")
@click.option("--model", default="", metavar="MODEL", help="Count its tokens too.")
@click.option("--sequence-length", default=256, show_default=True, help="Tokens of a sequence.")
@as_json
def data_lint(sources: tuple[str, ...], json_: bool, **given: Any) -> None:
    """Say how much of a text is doubled, broken, too short, or in the evaluation text too.

    Of several texts it says how many tokens, or characters, are of each.

    \b
    compress-cluster data lint train.jsonl --evaluation held-out.jsonl
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.cli import checks

    checks.texts(sources, json_=json_, **given)


@click.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors.

    \b
    compress-cluster schema > recipe.schema.json
    # yaml-language-server: $schema=recipe.schema.json       as the first line of a recipe
    """  # noqa: D301 click's mark for lines to leave as they are
    import json

    from orchestrator.recipe.config import RunConfig

    echo(json.dumps(RunConfig.model_json_schema(), indent=1))


@click.group()
def recipes() -> None:
    """Recipes that come with the package, for `run -r NAME`."""


@recipes.command("ls")
@as_json
def recipes_ls(json_: bool) -> None:
    """List them, and what each is for."""
    from orchestrator.cli import checks

    checks.recipes(json_=json_)


@recipes.command("show")
@click.argument("name", shell_complete=completion.recipes)
def recipes_show(name: str) -> None:
    """Print one, to be changed and given to -r as a file."""
    from orchestrator.recipe.presets import text

    echo(text(name), nl=False)


@click.command(hidden=True)
@click.option("--sent-by", required=True)
@click.option("--tries", type=int, required=True)
@click.option("--recipe", required=True)
@click.option("--lent", default="", help="Name of the token for the Hub in the head's memory.")
@terms_options
def job(sent_by: str, tries: int, recipe: str, lent: str, **given: Any) -> None:
    """Do on the head what `submit` sent."""
    from orchestrator.remote import supervisor

    secret = ""
    if lent:
        from orchestrator.backend import ray_cluster

        secret = ray_cluster.take(lent)

    def say(text: str) -> None:
        echo(text, err=True)

    sys.exit(
        supervisor.do_job(
            recipe, sent_by=sent_by, tries=tries, say=say, terms=terms_of(given), secret=secret
        )
    )


@click.command("watch-node")
@click.option("--address", default="auto", show_default=True, help="Of the Ray cluster.")
@click.option("--node", default="", help="Ray's id of the node; none means this one.")
@click.option("--metadata", default=METADATA, hidden=True, help="Base URL of the metadata service.")
def watch_node(address: str, node: str, metadata: str) -> None:
    """Wait for the cloud's notice that this machine will be preempted, and drain its node.

    \b
    nohup compress-cluster watch-node > /tmp/watch-node.log 2>&1 &
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.backend import node_agent

    node_agent.watch_node(address, node=node, metadata=metadata, say=echo)


@click.command()
@click.argument("file", metavar="RUN/failures/UNIT.json", shell_complete=completion.files)
def reproduce(file: str) -> None:
    """Do the work of a failure again in this process, where it can be debugged; write nothing.

    Exits with 1, or the failure's own code, where it fails again.
    """
    import traceback

    from orchestrator.engine.reproduce import read_reproducer
    from orchestrator.engine.reproduce import reproduce as do_again

    call, setup = read_reproducer(file)
    try:
        do_again(call, setup)
    except CompressionError as error:
        traceback.print_exception(error)
        sys.exit(error.exit_code)
    except Exception as error:  # noqa: BLE001 whatever it is, it is what was asked for
        traceback.print_exception(error)
        sys.exit(1)
    echo("it did not fail here")


COMMANDS: tuple[click.Command, ...] = (
    cluster,
    submit,
    logs,
    cancel,
    job,
    batch,
    watch,
    watch_node,
    reproduce,
    doctor,
    data,
    recipes,
    schema,
)
