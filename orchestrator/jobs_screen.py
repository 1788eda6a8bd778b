"""What the commands about jobs print."""

import json
from collections.abc import Mapping
from dataclasses import asdict

import click

from actors.storage.files import Directory
from orchestrator import submission
from orchestrator.config import RunConfig


def submit(
    config: RunConfig, *, address: str, tries: int, terms: Mapping[str, float], json_: bool
) -> None:
    """Send a run to a cluster and say how to follow it."""
    job = submission.submit(config, address=address, tries=tries, terms=terms)
    if json_:
        click.echo(json.dumps({"run": config.out, "job": asdict(job)}))
        return
    click.echo(f"job {job.submission_id} at {job.address}; it goes on without this terminal")
    for verb in ("watch", "logs", "cancel"):
        click.echo(f"  compress-cluster {verb} {config.out}")


def logs(run_uri: str, *, follow: bool) -> None:
    """Print what the job of a run printed."""
    for text in submission.follow(Directory(run_uri), to_end=follow):
        click.echo(text, nl=False)


def cancel(run_uri: str, *, json_: bool) -> None:
    """Stop the job of a run."""
    stopped = submission.cancel(Directory(run_uri))
    if json_:
        click.echo(json.dumps({"run": run_uri, "stopped": stopped}))
    elif stopped:
        click.echo("stopping; what is done is kept, and `compress-cluster submit` goes on with it")
    else:
        click.echo("it was not running")
