"""What the commands about jobs print."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial

from actors.storage.files import Directory
from orchestrator.recipe.config import RunConfig
from orchestrator.remote import submission
from orchestrator.report.console import echo


def submit(
    config: RunConfig, *, address: str, tries: int, terms: Mapping[str, float], json_: bool
) -> None:
    """Send a run to a cluster and say how to follow it."""
    job = submission.submit(
        config, address=address, tries=tries, terms=terms, say=partial(echo, err=True)
    )
    if json_:
        echo(json.dumps({"run": config.out, "job": asdict(job)}))
        return
    echo(f"job {job.submission_id} at {job.address}; it goes on without this terminal")
    for verb in ("watch", "logs", "cancel"):
        echo(f"  compress-cluster {verb} {config.out}")


def logs(run_uri: str, *, follow: bool) -> None:
    """Print what the job of a run printed."""
    for text in submission.follow(Directory(run_uri), to_end=follow):
        echo(text, nl=False)


def cancel(run_uri: str, *, json_: bool) -> None:
    """Stop the job of a run."""
    stopped = submission.cancel(Directory(run_uri))
    if json_:
        echo(json.dumps({"run": run_uri, "stopped": stopped}))
    elif stopped:
        echo("stopping; what is done is kept, and `compress-cluster submit` goes on with it")
    else:
        echo("it was not running")
