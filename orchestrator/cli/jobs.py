"""Commands for runs as cluster jobs, for nodes, and for reproducing failures."""

import sys
from dataclasses import asdict
from functools import partial
from typing import Any

import click

from orchestrator.backend.cloud_notices import METADATA
from orchestrator.cli import completion
from orchestrator.cli.options import (
    RecipeCommand,
    as_json,
    config_of,
    model_argument,
    recipe_file,
    run_argument,
    terms,
    terms_of,
)
from orchestrator.cli.output import echo, emit
from planners.errors import CompressionError


@click.command(cls=RecipeCommand)
@model_argument
@recipe_file
@click.option(
    "--to",
    metavar="URL",
    default="http://127.0.0.1:8265",
    show_default=True,
    envvar="RAY_API_SERVER_ADDRESS",
    help="Dashboard of the cluster; `ray dashboard cluster.yaml` tunnels it to the default.",
)
@click.option(
    "--keep-alive",
    type=click.IntRange(0, 100),
    default=0,
    metavar="N",
    help="Restart a killed driver up to N times. [0]",
)
@terms
@as_json
def submit(model: str | None, to: str, keep_alive: int, json_: bool, **given: Any) -> None:
    """Submit a run to a cluster as a job.

    Takes the options of `run` and returns at once; status, watch, logs and cancel take RUN.

    \b
    ray dashboard cluster.yaml &
    compress-cluster submit llama-2-70b --workers 8 --out s3://BUCKET/runs/llama-2-70b
    compress-cluster logs s3://BUCKET/runs/llama-2-70b --follow
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.remote.submission import submit

    prices = terms_of(given)
    config = config_of(model, given)
    say = partial(echo, err=True)
    job = submit(config, address=to, tries=keep_alive + 1, terms=prices, say=say)

    def show() -> None:
        where = f"job {job.submission_id} at {job.address}"
        echo(f"{where}; it keeps running after this terminal closes")
        for verb in ("watch", "logs", "cancel"):
            echo(f"  compress-cluster {verb} {config.out}")

    emit({"run": config.out, "job": asdict(job)}, show, json_=json_)


@click.command()
@run_argument
@click.option("--follow", "-f", is_flag=True, help="Follow the log until the job ends.")
def logs(run_uri: str, follow: bool) -> None:
    """Print the log of the job of RUN."""
    from actors.storage.files import Directory
    from orchestrator.remote import submission

    for text in submission.follow(Directory(run_uri), to_end=follow):
        echo(text, nl=False)


@click.command()
@run_argument
@as_json
def cancel(run_uri: str, json_: bool) -> None:
    """Stop the job of RUN; submit resumes it."""
    from actors.storage.files import Directory
    from orchestrator.remote.submission import cancel

    stopped = cancel(Directory(run_uri))
    said = "stopping; finished work is kept, and `compress-cluster submit` resumes it"
    show = partial(echo, said if stopped else "the job was not running")
    emit({"run": run_uri, "stopped": stopped}, show, json_=json_)


@click.command(hidden=True)
@click.option("--sent-by", required=True)
@click.option("--tries", type=int, required=True)
@click.option("--recipe", required=True)
@click.option("--lent", default="", help="Name of the token for the Hub in the head's memory.")
@terms
def job(sent_by: str, tries: int, recipe: str, lent: str, **given: Any) -> None:
    """Run on the head what `submit` sent."""
    from orchestrator.remote.restart_driver import do_job

    secret = ""
    if lent:
        from orchestrator.backend import ray_cluster

        secret = ray_cluster.take(lent)
    say = partial(echo, err=True)
    sys.exit(
        do_job(recipe, sent_by=sent_by, tries=tries, say=say, terms=terms_of(given), secret=secret)
    )


@click.command("watch-node")
@click.option("--address", default="auto", show_default=True, help="Address of the Ray cluster.")
@click.option("--node", default="", help="Ray's id of the node. [this node]")
@click.option("--metadata", default=METADATA, hidden=True, help="Base URL of the metadata service.")
def watch_node(address: str, node: str, metadata: str) -> None:
    """Drain this node when its cloud preempts it.

    \b
    nohup compress-cluster watch-node > /tmp/watch-node.log 2>&1 &
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator.backend.node_agent import watch_node

    watch_node(address, node=node, metadata=metadata, say=echo)


@click.command()
@click.argument("file", metavar="RUN/failures/UNIT.json", shell_complete=completion.files)
def reproduce(file: str) -> None:
    """Repeat failed work in this process, to debug it.

    Exits with 1, or the failure's own code, if it fails again.
    """
    import traceback

    from orchestrator.engine.reproduce import read_reproducer, reproduce

    call, setup = read_reproducer(file)
    try:
        reproduce(call, setup)
    except Exception as error:  # noqa: BLE001 whatever it is, it is what was asked for
        traceback.print_exception(error)
        sys.exit(error.exit_code if isinstance(error, CompressionError) else 1)
    echo("the work did not fail here")


ALL = (submit, logs, cancel, job, watch_node, reproduce)
