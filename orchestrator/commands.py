"""The commands about clusters, jobs, batches and first contact; parse, call, print."""

import click

as_json = click.option("--json", "json_", is_flag=True, help="One JSON document on stdout.")


@click.group()
def cluster() -> None:
    """Look at a cluster file before a machine is rented."""


@cluster.command("lint")
@click.argument("file", metavar="FILE")
@as_json
def cluster_lint(file: str, json_: bool) -> None:
    """Say what is wrong in a cluster file of Ray or SkyPilot that their own check does not see.

    \b
    compress-cluster cluster lint cluster.yaml
    """  # noqa: D301 click's mark for lines to leave as they are
    from orchestrator import findings

    findings.cluster_file(file, json_=json_)


COMMANDS: tuple[click.Command, ...] = (cluster,)
