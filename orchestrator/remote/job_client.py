"""Jobs on a remote cluster, through the job API of Ray's dashboard.

Plain HTTP without Ray: a laptop needs neither the cluster's Ray version nor any port of the cluster
other than the one that `ray dashboard` tunnels.
"""

import contextlib
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from threading import Timer
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from orchestrator.backend.capacity import LENT
from planners.errors import ClusterError, ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TIMEOUT_SECONDS = 10.0
NO_AGENT = "No available agent"  # what Ray says before its first node has registered
AGENT_SECONDS = 180.0  # a new head node on a busy machine needs more than a minute
QUIET_SECONDS = 3.0  # a longer wait is announced: the head node itself answers after 10
AGENT = (
    "on the head node, `ray status` and dashboard_agent.log in /tmp/ray/session_latest/logs show "
    "why; `ray stop`, then the command that started the cluster, restarts the agent"
)
SUBMIT_SECONDS = 60.0  # the head node starts a process before it answers
OWNER_ONLY = 0o600
REFUSED = (401, 403)
NOT_FOUND = 404
SERVER_FAULT = 500  # and above
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: the token is for this server only, not for a redirect's target."""

    def redirect_request(self, *args: Any) -> None:
        """Return no new request."""
        del args


class JobClient:
    """The job API of one cluster."""

    def __init__(self, address: str) -> None:
        """Check the address of a cluster; nothing is sent.

        Raises:
            ConfigError: the address is not a URL, holds a password, or would send a job over the
                network to a cluster that requires no token.
        """
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--to {address}: must be the URL of a dashboard, such as {DEFAULT_ADDRESS}",
                hint="`ray dashboard cluster.yaml` makes one available on this machine",
            )
        if parts.username or parts.password:
            raise ConfigError(
                "--to: the URL must not contain a user or password; it is written into files"
            )
        self.address = address.rstrip("/")
        self._token = _token()
        if not self._token and not is_loopback(parts.hostname):
            raise ConfigError(
                f"--to {address}: is not this machine, and no token is set: the job could be read "
                "on the network, and anybody who can reach the dashboard could run code there",
                hint="`ray dashboard cluster.yaml` opens a tunnel from 127.0.0.1; a cluster's "
                "token is in ~/.ray/auth_token",
            )
        # A proxy named in the environment must not be used for a loopback address.
        proxies: dict[str, str] | None = {} if is_loopback(parts.hostname) else None
        self._opener = urllib.request.build_opener(
            _NoRedirect(), urllib.request.ProxyHandler(proxies)
        )

    def ray_version(self) -> str:
        """Return the cluster's Ray version.

        Raises:
            ClusterError: there is no cluster, or it refuses access.
        """
        found = self._call("GET", "/api/version")
        return str(found.get("ray_version", "unknown"))

    def submit(
        self,
        entrypoint: str,
        *,
        submission_id: str,
        env: dict[str, str],
        metadata: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        """Start a command on the head node; it keeps running when this process ends.

        Args:
            entrypoint: the command.
            submission_id: its name on the cluster.
            env: its environment.
            metadata: what the cluster stores with it.
            say: prints what is being waited for, once that takes seconds.

        Raises:
            ClusterError: there is no cluster, or it does not accept the job.
        """
        job = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": env},
            "metadata": metadata,
            "entrypoint_num_cpus": 0,  # the head node offers none
        }
        waiting = (
            f"waiting for the job agent of the head node at {self.address}, for up to "
            f"{AGENT_SECONDS:.0f} s; it starts some time after the head node"
        )
        timer = Timer(QUIET_SECONDS, say, [waiting])
        timer.daemon = True
        timer.start()
        try:
            self._submit(job, until=time.monotonic() + AGENT_SECONDS)
        finally:
            timer.cancel()

    def _submit(self, job: dict[str, Any], *, until: float) -> None:
        while True:
            try:
                self._call("POST", "/api/jobs/", job, seconds=SUBMIT_SECONDS)
            except _NotYetError as error:
                if time.monotonic() > until:
                    raise ClusterError(
                        f"the cluster at {self.address} accepts no jobs: the job agent of its head "
                        f"node did not answer within {AGENT_SECONDS:.0f} s",
                        hint=AGENT,
                    ) from error
                time.sleep(1.0)
            else:
                return

    def lend(self, secret: str) -> str:
        """Store a secret in the head node's memory for one job to take; return its name there.

        It is not part of the job, which everybody with the cluster's token can read, and is written
        to no file. `ray_cluster.take` removes it; otherwise Ray removes it within minutes.

        Raises:
            ConfigError: it would be sent over a network unencrypted.
            ClusterError: there is no cluster, or it does not accept the secret.
        """
        parts = urlsplit(self.address)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise ConfigError(
                f"--to {self.address}: the Hub token would be sent over the network unencrypted",
                hint="`ray dashboard cluster.yaml` opens a tunnel from 127.0.0.1",
            )
        name = f"compress-cluster-{uuid4().hex}.zip"  # a package name as Ray accepts it
        path = f"/api/packages/gcs/{name}"
        self._send("PUT", path, (LENT + secret).encode())
        self._send("GET", path)  # starts Ray's expiry time
        return name

    def info(self, submission_id: str) -> dict[str, Any] | None:
        """Return the cluster's information on a job, or None if it has no job of that name.

        Raises:
            ClusterError: there is no cluster, or it refuses access.
        """
        try:
            found: dict[str, Any] = self._call("GET", f"/api/jobs/{submission_id}")
        except _NotFoundError:
            return None
        return found

    def logs(self, submission_id: str) -> str:
        """Return everything a job has printed so far.

        Raises:
            ClusterError: there is no cluster, or it has no such job.
        """
        return str(self._call("GET", f"/api/jobs/{submission_id}/logs").get("logs", ""))

    def stop(self, submission_id: str) -> bool:
        """Request that a job stops, as Ctrl-C would; return whether it was running.

        Raises:
            ClusterError: there is no cluster, or it has no such job.
        """
        return bool(self._call("POST", f"/api/jobs/{submission_id}/stop", {}).get("stopped"))

    def _call(
        self,
        verb: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float = TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            found = json.loads(self._send(verb, path, data, seconds=seconds))
        except ValueError as error:
            raise ClusterError(f"{self.address} is not a Ray dashboard: {error}") from error
        if not isinstance(found, dict):
            raise ClusterError(f"{self.address} is not a Ray dashboard")
        return found

    def _send(
        self, verb: str, path: str, data: bytes | None = None, *, seconds: float = TIMEOUT_SECONDS
    ) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        request = urllib.request.Request(
            self.address + path, data=data, headers=headers, method=verb
        )
        try:
            with self._opener.open(request, timeout=seconds) as answer:
                found: bytes = answer.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from error
        except TimeoutError as error:  # the request was sent; a URLError is not a TimeoutError
            raise ClusterError(
                f"the cluster at {self.address} did not answer within {seconds:.0f} s", hint=AGENT
            ) from error
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no cluster at {self.address}: {reason}",
                hint="is it up, and is its tunnel open? `ray up cluster.yaml`, then "
                "`ray dashboard cluster.yaml` in another terminal",
            ) from error
        return found

    def _refusal(self, error: urllib.error.HTTPError) -> ClusterError:
        if error.code in REFUSED:
            problem = "is not this cluster's" if self._token else "is missing"
            return ClusterError(
                f"{self.address} refuses access: the token {problem}",
                hint="copy ~/.ray/auth_token from the machine that started the cluster, or set "
                "RAY_AUTH_TOKEN",
            )
        text = error.read(2000).decode(errors="replace").strip()
        lines = [line for line in text.splitlines() if line.strip()]
        kind = _NotFoundError if error.code == NOT_FOUND else ClusterError
        if NO_AGENT in text:
            kind = _NotYetError
        message = lines[-1].strip() if lines else error.reason
        if text.startswith("Traceback"):  # from the head node: drop the exception's class name
            message = message.partition(": ")[2] or message
        hint = AGENT if error.code >= SERVER_FAULT else ""
        return kind(f"{self.address} answered {error.code}: {message}", hint=hint)


class _NotYetError(ClusterError):
    """The cluster has just started and cannot start a job yet."""


class _NotFoundError(ClusterError):
    """The cluster answers, but does not have what was requested."""


def is_loopback(host: str) -> bool:
    """Return whether a host name or address means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_file() -> Path:
    """Return the path of the cluster token, as Ray finds it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _token() -> str:
    """Return the token, as Ray finds it; make its file readable by its owner only."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = token_file()
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(OWNER_ONLY)  # Ray leaves it open to all users
        return path.read_text(encoding="utf-8").strip()
    return ""
