"""A run as a job: submitted to a cluster, and found again from its run directory alone."""

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

from actors.storage import hub
from actors.storage.files import Directory
from actors.storage.records import require_directory
from actors.storage.sources import hub_place
from orchestrator.recipe.config import RunConfig
from orchestrator.remote.job_client import ENDED, JobClient
from orchestrator.rundir.layout import JOB
from planners.errors import ClusterError, ConfigError, StorageError

PACKAGE = "compress-cluster"
POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Where the driver of a run was submitted.

    Attributes:
        address: of the dashboard, as seen from the submitting machine.
        submission_id: the job's name on the cluster.
        submitted: seconds since the epoch.
        tries: drivers that may be started, one after the other.
        version: of this package on the submitting machine.
    """

    address: str
    submission_id: str
    submitted: float
    tries: int
    version: str


def submit(
    config: RunConfig,
    *,
    address: str,
    tries: int,
    terms: Mapping[str, float] | None = None,
    say: Callable[[str], None],
) -> Job:
    """Submit a run to a cluster and record that in its run directory.

    A model on the Hub is looked up here, so that a refusal comes at once and every driver of the
    run reads the same commit. The token used for the look-up is lent to the job.

    Args:
        config: the recipe.
        address: of the cluster's dashboard.
        tries: drivers that may be started, one after the other.
        terms: ``price`` and ``preemptions_per_hour`` of a worker, for the run to plan with.
        say: prints what is being waited for, once that takes seconds.

    Raises:
        ConfigError: the run has no directory that both can see, or is already running.
        ModelError: the model is on the Hub and may not be read, or the Hub cannot be reached.
        ClusterError: there is no cluster, it has another Ray version, or it refuses access.
        StorageError: the run directory cannot be written.
    """
    if not config.out:
        raise ConfigError(
            "--out: is required: this machine and the cluster exchange files there",
            hint="--out s3://BUCKET/runs/NAME, or a folder that both share",
        )
    run = Directory(config.out)
    client = JobClient(address)
    theirs, ours = client.ray_version(), metadata.version("ray")
    if theirs != ours:
        raise ClusterError(
            f"the cluster at {address} has Ray {theirs}; this machine has {ours}",
            hint="install the same versions on both: pip install -c constraints.txt",
        )
    model, token = _looked_up(config.model)
    require_directory(run)
    _refuse_second(run)
    out = run.uri if not run.is_local else str(Path(run.root).resolve())
    own = {"model": model, "out": out, "address": "auto"}
    recipe = {**config.model_dump(exclude_unset=True), **own}
    job = Job(
        address=client.address,
        submission_id=f"compress-{hashlib.sha256(out.encode()).hexdigest()[:8]}-{uuid4().hex[:8]}",
        submitted=time.time(),
        tries=tries,
        version=metadata.version(PACKAGE),
    )
    words = ["compress-cluster", "job", "--sent-by", job.version, "--tries", str(tries)]
    words += words_of(terms or {})
    if token:
        words += ["--lent", client.lend(token)]
    entrypoint = shlex.join([*words, "--recipe", json.dumps(recipe, sort_keys=True)])
    # Written first: a job that the cluster accepted without an answer can still be found.
    run.write(JOB, json.dumps(asdict(job), indent=1, sort_keys=True).encode())
    try:
        client.submit(
            entrypoint,
            submission_id=job.submission_id,
            env={"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"},
            metadata={"run": out, "model": config.model},
            say=say,
        )
    except ClusterError:
        if client.info(job.submission_id) is None:
            run.delete(JOB)
            raise
    return job


def job_of(run: Directory) -> Job | None:
    """Return where a run was submitted, or None if it was not or its record is incomplete."""
    if run.size(JOB) is None:
        return None
    try:
        return Job(**json.loads(run.read(JOB)))
    except (ValueError, TypeError):
        return None


def required_job(run: Directory) -> Job:
    """Return where a run was submitted.

    Raises:
        StorageError: the run was not submitted.
    """
    job = job_of(run)
    if job is None:
        raise StorageError(
            f"{run.uri}: was not submitted to a cluster",
            hint="`compress-cluster submit` submits it",
        )
    return job


def state(job: Job) -> str:
    """Return a job's state on its cluster, ``RUNNING``, ``FAILED``, ..., or why it is unknown.

    Raises:
        ConfigError: the address in the run directory's job record is not a URL.
    """
    try:
        info = JobClient(job.address).info(job.submission_id)
    except ClusterError as error:
        return f"unknown: {error}"
    return "unknown to the cluster" if info is None else str(info["status"])


def described(run: Directory) -> dict[str, Any] | None:
    """Return the job of a run with its ``state``, or None if it was not submitted."""
    job = job_of(run)
    return None if job is None else {**asdict(job), "state": state(job)}


def follow(run: Directory, *, to_end: bool) -> Iterator[str]:
    """Yield what the job of a run prints, until it ends or only what it has printed so far.

    Raises:
        StorageError: the run was not submitted.
        ClusterError: there is no cluster, or it has no such job.
    """
    job = required_job(run)
    client, printed = JobClient(job.address), 0
    while True:
        info = client.info(job.submission_id)
        if info is None:
            raise ClusterError(
                f"the cluster at {job.address} has no job {job.submission_id}",
                hint="it is another cluster, or was restarted; submit again to resume",
            )
        text = client.logs(job.submission_id)
        if len(text) > printed:
            yield text[printed:]
            printed = len(text)
        if not to_end or info["status"] in ENDED:
            return
        time.sleep(POLL_SECONDS)


def cancel(run: Directory) -> bool:
    """Request that the job of a run stops, as Ctrl-C would; return whether it was running.

    Raises:
        StorageError: the run was not submitted.
        ClusterError: there is no cluster, or it has no such job.
    """
    job = required_job(run)
    return JobClient(job.address).stop(job.submission_id)


def words_of(terms: Mapping[str, float]) -> list[str]:
    """Return the worker's price and preemption rate as command-line options."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in terms.items()]
    return [word for pair in pairs for word in pair]


def _looked_up(model: str) -> tuple[str, str]:
    """Return a Hub model's name with its commit, and the token used; other models are unchanged.

    Raises:
        ModelError: it may not be read, or the Hub cannot be reached.
    """
    place = hub_place(model)
    if place is None:
        return model, ""
    _, repo_id, revision = place
    commit = hub.find_model(repo_id, revision)
    return f"{model.rstrip('/').partition('@')[0]}@{commit.hash}", hub.token_here()


def _refuse_second(run: Directory) -> None:
    job = job_of(run)
    if job is not None and state(job) in ("PENDING", "RUNNING"):
        raise ConfigError(
            f"{run.uri}: is already running, as job {job.submission_id} at {job.address}",
            hint=f"compress-cluster watch {run.uri}, or cancel it first",
        )
