"""Jobs on a cluster that is elsewhere, through the job API of Ray's dashboard.

Plain HTTP and no Ray: a laptop needs neither the cluster's version nor a port of it besides the one
that `ray dashboard` tunnels.
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
AGENT_SECONDS = 180.0  # a head that has just begun on a busy machine takes a minute and more
QUIET_SECONDS = 3.0  # after which a wait is told: the head itself answers after 10
AGENT = (
    "on the head, `ray status` and dashboard_agent.log in /tmp/ray/session_latest/logs say why; "
    "`ray stop`, then the command that began the cluster, starts the agent anew"
)
SUBMIT_SECONDS = 60.0  # the head starts a process before it answers
OWNER_ONLY = 0o600
REFUSED = (401, 403)
NOT_FOUND = 404
SERVER_FAULT = 500  # and above
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows nothing: the token is for this server, not for where it points."""

    def redirect_request(self, *args: Any) -> None:
        """Return no new request."""
        del args


class JobClient:
    """The job API of one cluster."""

    def __init__(self, address: str) -> None:
        """Name a cluster; nothing is sent.

        Raises:
            ConfigError: the address is none, holds a password, or would send a job over the
                network to a cluster that lets everybody in.
        """
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"--to {address}: must be the URL of a dashboard, such as {DEFAULT_ADDRESS}",
                hint="`ray dashboard cluster.yaml` makes one on this machine",
            )
        if parts.username or parts.password:
            raise ConfigError("--to: no user or password in the URL; it is written into files")
        self.address = address.rstrip("/")
        self._token = _token()
        if not self._token and not is_loopback(parts.hostname):
            raise ConfigError(
                f"--to {address}: is not this machine, and there is no token: whoever listens "
                "would get the job, and whoever can reach it runs code there",
                hint="`ray dashboard cluster.yaml` makes a tunnel from 127.0.0.1; the token of a "
                "cluster is in ~/.ray/auth_token",
            )
        # No proxy of the environment stands between this machine and a loopback address.
        proxies: dict[str, str] | None = {} if is_loopback(parts.hostname) else None
        self._opener = urllib.request.build_opener(
            _NoRedirect(), urllib.request.ProxyHandler(proxies)
        )

    def ray_version(self) -> str:
        """Return the version of Ray there.

        Raises:
            ClusterError: there is no cluster, or it does not let this client in.
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
        """Start a command on the head; it goes on when this process ends.

        Args:
            entrypoint: the command.
            submission_id: its name there.
            env: its environment.
            metadata: what the cluster keeps with it.
            say: hears what is waited for, once that takes seconds.

        Raises:
            ClusterError: there is no cluster, or it does not take the job.
        """
        job = {
            "entrypoint": entrypoint,
            "submission_id": submission_id,
            "runtime_env": {"env_vars": env},
            "metadata": metadata,
            "entrypoint_num_cpus": 0,  # the head has none to give
        }
        waiting = (
            f"waiting for the job agent of the head at {self.address}; a head that has just begun "
            f"has none yet, and after {AGENT_SECONDS:.0f} s this gives up"
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
                        f"the cluster at {self.address} takes no job: the job agent of its head "
                        f"did not answer within {AGENT_SECONDS:.0f} s",
                        hint=AGENT,
                    ) from error
                time.sleep(1.0)
            else:
                return

    def lend(self, secret: str) -> str:
        """Leave a secret in the memory of the head for a job to take; return the name it is under.

        It is no part of the job, which everybody with the cluster's token can look at, and is in
        no file. `ray_cluster.take` removes it; what nobody takes Ray removes within minutes.

        Raises:
            ConfigError: it would go over a network in clear.
            ClusterError: there is no cluster, or it does not take it.
        """
        parts = urlsplit(self.address)
        if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
            raise ConfigError(
                f"--to {self.address}: the token for the Hub would go over the network in clear",
                hint="`ray dashboard cluster.yaml` makes a tunnel from 127.0.0.1",
            )
        name = f"compress-cluster-{uuid4().hex}.zip"  # Ray keeps packages so, by any name
        path = f"/api/packages/gcs/{name}"
        self._send("PUT", path, (LENT + secret).encode())
        self._send("GET", path)  # from now on Ray counts the minutes
        return name

    def info(self, submission_id: str) -> dict[str, Any] | None:
        """Return what is known of a job, or None where the cluster knows none of that name.

        Raises:
            ClusterError: there is no cluster, or it does not let this client in.
        """
        try:
            found: dict[str, Any] = self._call("GET", f"/api/jobs/{submission_id}")
        except _NotFoundError:
            return None
        return found

    def logs(self, submission_id: str) -> str:
        """Return all that a job has printed so far.

        Raises:
            ClusterError: there is no cluster, or it knows no such job.
        """
        return str(self._call("GET", f"/api/jobs/{submission_id}/logs").get("logs", ""))

    def stop(self, submission_id: str) -> bool:
        """Ask a job to end, as Ctrl-C would; return whether it was running.

        Raises:
            ClusterError: there is no cluster, or it knows no such job.
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
            raise ClusterError(f"{self.address} is no dashboard of Ray: {error}") from error
        if not isinstance(found, dict):
            raise ClusterError(f"{self.address} is no dashboard of Ray")
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
        except TimeoutError as error:  # it took the request; an URLError is none
            raise ClusterError(
                f"the cluster at {self.address} did not answer within {seconds:.0f} s", hint=AGENT
            ) from error
        except (OSError, HTTPException) as error:  # URLError is one
            reason = getattr(error, "reason", error)
            raise ClusterError(
                f"no cluster at {self.address}: {reason}",
                hint="is it up, and is its tunnel open? `ray up cluster.yaml`, then "
                "`ray dashboard cluster.yaml` in another terminal",
            ) from error
        return found

    def _refusal(self, error: urllib.error.HTTPError) -> ClusterError:
        if error.code in REFUSED:
            which = "is not the one of this cluster" if self._token else "is missing"
            return ClusterError(
                f"{self.address} does not let this machine in: the token {which}",
                hint="copy ~/.ray/auth_token from the machine that started the cluster, or set "
                "RAY_AUTH_TOKEN",
            )
        text = error.read(2000).decode(errors="replace").strip()
        lines = [line for line in text.splitlines() if line.strip()]
        kind = _NotFoundError if error.code == NOT_FOUND else ClusterError
        if NO_AGENT in text:
            kind = _NotYetError
        said = lines[-1].strip() if lines else error.reason
        if text.startswith("Traceback"):  # of the head's own: the name of a class says nothing here
            said = said.partition(": ")[2] or said
        hint = AGENT if error.code >= SERVER_FAULT else ""
        return kind(f"{self.address} answers {error.code}: {said}", hint=hint)


class _NotYetError(ClusterError):
    """The cluster is so young that nothing there can start a job yet."""


class _NotFoundError(ClusterError):
    """The cluster is there, what was asked for is not."""


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def token_file() -> Path:
    """Return where the token of clusters lies, as Ray looks for it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def _token() -> str:
    """Return the token, as Ray finds it; its file is readable by its owner only from here on."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = token_file()
    with contextlib.suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(OWNER_ONLY)  # Ray leaves it open to all users
        return path.read_text(encoding="utf-8").strip()
    return ""
