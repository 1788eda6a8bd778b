"""Connect to a Ray cluster, or start one for this command only."""

import contextlib
import copy
import io
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private import state as ray_state
from ray.autoscaler import sdk
from ray.exceptions import RaySystemError, RpcError

from orchestrator.backend import local_start
from orchestrator.backend.capacity import LENT, awaited, cluster_file_here, max_resources
from orchestrator.backend.executor import EarlyActor
from planners.errors import ClusterError

# A frozen node is noticed within about 10 s, not a minute; see Ray's health check.
HEALTH_CHECK: Mapping[str, int] = MappingProxyType(
    {
        "health_check_initial_delay_ms": 1000,
        "health_check_period_ms": 1000,
        "health_check_timeout_ms": 2000,
        "health_check_failure_threshold": 3,
        "object_manager_pull_timeout_ms": 2000,
    }
)  # read only: Ray adds to what it is given
CLUSTER_OF_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's, read on Linux too
STORE_BYTES = 200 * 2**20
LISTEN_SECONDS = 3.0  # within which a head node accepts a connection
ANSWER_SECONDS = 0.5  # within which a healthy raylet accepts a connection


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFacts:
    """The resources of a cluster.

    Attributes:
        address: as given; ``local`` was started by this command.
        num_nodes: live nodes.
        cpus: logical cores for work.
        gpus: devices.
        dashboard: address of Ray's dashboard, or empty.
        spot: a node is labelled as spot capacity.
        early: processes that were started on it already.
    """

    address: str
    num_nodes: int
    cpus: float
    gpus: float
    dashboard: str
    spot: bool = False
    early: list[EarlyActor] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Ray on this machine, started before the plan of a run was known.

    Attributes:
        num_cpus: cores that it offers.
        dashboard: address of its dashboard, or empty.
        stop: stops it.
        early: processes of actors on it.
    """

    num_cpus: int
    dashboard: str
    stop: Callable[[], None]
    early: list[EarlyActor] = field(default_factory=list)


@contextlib.contextmanager
def started_ahead(*, num_cpus: int, dashboard: bool) -> Iterator[Ahead]:
    """Start Ray on this machine, for `connected` to use in this block if it is large enough.

    Raises:
        ClusterError: Ray does not start.
    """
    with contextlib.ExitStack() as stack:
        place = _on_this_machine(num_cpus=num_cpus, store_bytes=STORE_BYTES, dashboard=dashboard)
        url = stack.enter_context(place)
        yield Ahead(num_cpus=num_cpus, dashboard=url, stop=stack.close)


@contextlib.contextmanager
def connected(
    address: str,
    *,
    num_cpus: int,
    num_gpus: int,
    store_bytes: int,
    dashboard: bool = False,
    ahead: Ahead | None = None,
) -> Iterator[ClusterFacts]:
    """Connect for the duration of a block; ``local`` starts a cluster and stops it afterwards.

    Args:
        address: ``local``, ``auto`` or ``host:port``.
        num_cpus: cores that the work needs at one time.
        num_gpus: devices that the work needs at one time.
        store_bytes: shared memory that a local cluster needs for activations.
        dashboard: start Ray's dashboard with a local cluster; on loopback only.
        ahead: a local one that runs already; if it is too small another takes its place, else it
            is used, and outlives the block.

    Raises:
        ClusterError: there is no cluster at the address, or it is too small; or Ray does not start.
    """
    if ahead is not None and (ahead.num_cpus < num_cpus or store_bytes > STORE_BYTES):
        ahead.stop()
        ahead = None
    with contextlib.ExitStack() as stack:
        if ahead is not None:
            url = ahead.dashboard
        elif address == "local":
            place = _on_this_machine(
                num_cpus=num_cpus, store_bytes=max(STORE_BYTES, store_bytes), dashboard=dashboard
            )
            url = stack.enter_context(place)
        else:
            _set_environment()
            url = joined(address).dashboard_url or ""
            stack.callback(ray.shutdown)
            _protect_token()
        facts = _facts(address, url)
        _require(facts, num_cpus=num_cpus, num_gpus=num_gpus)
        yield facts if ahead is None else replace(facts, early=ahead.early)


@contextlib.contextmanager
def _on_this_machine(*, num_cpus: int, store_bytes: int, dashboard: bool) -> Iterator[str]:
    """Start Ray for a block; yield the address of its dashboard, or empty."""
    _set_environment()
    with local_start.sockets() as folder:
        context = _started(
            num_cpus=num_cpus,
            include_dashboard=dashboard,
            object_store_memory=store_bytes,
            _temp_dir=folder,
        )
        try:
            _protect_token()
            yield context.dashboard_url or ""
        finally:
            ray.shutdown()  # before its directory is removed


def _set_environment() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # unread second returns of lost calls
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def most_gpus(address: str) -> float:
    """Return how many GPUs a cluster has, or has when it is fully grown.

    Raises:
        ClusterError: there is no cluster at the address.
    """
    with connected(address, num_cpus=0, num_gpus=0, store_bytes=0) as facts:
        return max(facts.gpus, max_resources(cluster_file_here(), "GPU"))


def _started(**how: Any) -> Any:
    """Start Ray for this process; retry once if a busy machine was only too slow.

    Raises:
        ClusterError: Ray does not start.
    """
    _refuse_second()
    for last in (False, True):
        try:
            with _on_loopback():
                return ray.init(
                    address="local",
                    dashboard_host="127.0.0.1",
                    log_to_driver=False,
                    logging_level="ERROR",
                    _system_config=dict(HEALTH_CHECK),
                    **how,
                )
        except Exception as error:  # Ray raises bare Exceptions; re-raised as ClusterError
            node = local_start.half_started(error)
            slow = local_start.was_slow(error, node)
            refusal = local_start.refusal_of_start(error, node)
            if node is not None:  # its processes would run until this one ends
                node.kill_all_processes(check_alive=False)
            ray.shutdown()
            if last or not slow:
                raise refusal from error
    raise AssertionError("the last try returns or raises")


def joined(address: str) -> Any:
    """Connect to a running cluster.

    Raises:
        ClusterError: there is none at the address, or it refuses access.
    """
    try:
        _require_listener(address)
    except (OSError, ValueError) as error:
        raise local_start.refusal_of_cluster(error, address) from error
    _refuse_second()
    try:
        return ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # as above
        ray.shutdown()
        raise local_start.refusal_of_cluster(error, address) from error


def _refuse_second() -> None:
    """Refuse a second connection: closing it would close the first.

    Raises:
        ClusterError: this process is already connected.
    """
    if ray.is_initialized():
        raise ClusterError(
            "this process is already connected to a Ray cluster", hint="call ray.shutdown() first"
        )


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray that is started in this block listen on loopback only, its metrics too.

    Ray does so by default on macOS and Windows; on Linux it uses the address of the machine, where
    its metrics are served without a token. Clusters of several machines need that address, so the
    setting ends with the block.
    """
    # Ray reads the variable on import, which has happened already: set its constant too.
    before = os.environ.get(CLUSTER_OF_MACHINES), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[CLUSTER_OF_MACHINES] = "0"  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[CLUSTER_OF_MACHINES]
        else:
            os.environ[CLUSTER_OF_MACHINES] = before[0]


def take(name: str) -> str:
    """Return the secret that `JobClient.lend` stored on the head node, and remove it there.

    Called in a process that a job started; no connection to the cluster is needed.

    Raises:
        ClusterError: it has expired, or the head node cannot be reached.
    """
    key = f"gcs://{name}".encode()
    try:
        client = ray._raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
        found = client.internal_kv_get(key, None)
        client.internal_kv_del(key, False, None)
    except (RaySystemError, RpcError) as error:
        raise ClusterError(f"cannot get the Hub token from the head node: {error}") from error
    if found is None:
        raise ClusterError(
            "the Hub token has expired on the head node: the job started too late",
            hint="submit again",
        )
    return bytes(found).decode().removeprefix(LENT)


def request_resources(bundles: Sequence[Mapping[str, float]]) -> None:
    """Request room for these bundles at once from the autoscaler; none withdraws the request."""
    with contextlib.suppress(RaySystemError, RpcError):  # without a head node nothing can grow
        sdk.request_resources(bundles=[dict(bundle) for bundle in bundles])


def capacity() -> str:
    """Return the cluster's total and free CPUs and GPUs as text."""
    have, free = ray.cluster_resources(), ray.available_resources()
    counts = [
        f"{free.get(kind, 0):g} of {have.get(kind, 0):g} {kind}"
        for kind in ("CPU", "GPU")
        if kind == "CPU" or kind in have
    ]
    return f"the cluster has {' and '.join(counts)} free"


def node_reachable(actor_id: str | None) -> bool:
    """Return whether the node of an actor accepts connections, which is known before Ray knows."""
    if actor_id is None:
        return True
    try:
        place = ray_state.actors(actor_id).get("Address", {}).get("NodeID")
        found = {node["NodeID"]: node for node in ray.nodes()}.get(place)
    except (RaySystemError, RpcError):
        return True  # without the head node nothing is known of the actor's node
    if found is None or not found["Alive"]:
        return False
    return _listens(found["NodeManagerAddress"], found["NodeManagerPort"])


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def _require_listener(address: str) -> None:
    """Check that something accepts connections: Ray itself retries silently for minutes.

    Raises:
        OSError: nothing does.
        ValueError: it is a URL: of Ray Client, which cannot do what a run needs, or of a dashboard.
    """
    found = address
    if address == "auto":  # RAY_ADDRESS, or what runs on this machine
        found = services.get_ray_address_from_environment(address, None)
    if "//" in found:
        raise ValueError(
            "is a URL; an address is HOST:PORT of the head node; only `submit` accepts a "
            "dashboard's URL"
        )
    host, _, port = found.rpartition(":")
    if not host or not port.isdigit():
        return  # another form of address, left to Ray
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=LISTEN_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens at {found}: {error}") from error


def _facts(address: str, dashboard: str) -> ClusterFacts:
    resources = ray.cluster_resources()
    labels = [node.get("Labels") or {} for node in ray.nodes() if node["Alive"]]
    return ClusterFacts(
        address=address,
        num_nodes=sum(1 for node in ray.nodes() if node["Alive"]),
        cpus=resources.get("CPU", 0.0),
        gpus=resources.get("GPU", 0.0),
        dashboard=dashboard,
        spot=any(each.get("ray.io/market-type") == "spot" for each in labels),
    )


def _require(facts: ClusterFacts, *, num_cpus: int, num_gpus: int) -> None:
    """Refuse a run that cannot fit: Ray would wait for ever without a message.

    Raises:
        ClusterError: the cluster is too small, even when fully grown.
    """
    cpus, gpus, grown = facts.cpus, facts.gpus, ""
    if facts.address != "local" and (num_cpus > cpus or num_gpus > gpus):
        file = cluster_file_here()  # an autoscaled cluster starts workers on request only
        if awaited(file, facts.num_nodes):
            return  # the pool announces that it waits for them
        most_cpus, most_gpus = max_resources(file, "CPU"), max_resources(file, "GPU")
        if most_cpus > cpus or most_gpus > gpus:
            cpus, gpus, grown = max(cpus, most_cpus), max(gpus, most_gpus), ", fully grown,"
    if num_cpus > cpus or num_gpus > gpus:
        raise ClusterError(
            f"the cluster at {facts.address!r}{grown} has {cpus:g} cores and {gpus:g} GPUs; "
            f"this run needs {num_cpus} and {num_gpus}",
            hint="use fewer --workers or --threads, or a larger cluster"
            + (", or --device cpu" if num_gpus > gpus else ""),
        )


def _protect_token() -> None:
    """Make Ray's access token readable by its owner only; Ray leaves it open to all users."""
    token = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # no home directory, no token
        if token.is_file():
            token.chmod(0o600)


def schema_refusal(values: Mapping[str, Any]) -> str:
    """Return why ``ray up`` would refuse a cluster file, in one line; empty if it would not."""
    # Not at the top: only one command needs the launcher's modules.
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    discarded = io.StringIO()  # what this prints is meant for users of `ray up`
    try:
        with contextlib.redirect_stdout(discarded), contextlib.redirect_stderr(discarded):
            validate_config(prepare_config(copy.deepcopy(dict(values))))
    except ValidationError as error:
        where = ".".join(map(str, error.absolute_path))
        return f"{where}: {error.message}" if where else str(error.message)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return ""
