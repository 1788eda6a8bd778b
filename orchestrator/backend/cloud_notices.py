"""Detect a cloud's notice that this machine will be preempted."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

METADATA = "http://169.254.169.254"
POLL_SECONDS = 2.0
ANSWER_SECONDS = 1.0  # the service is on the machine itself
MAX_SILENT_POLLS = 3  # polls without an answer, after which this is not a cloud machine
AWS_SECONDS = 120.0
GCP_SECONDS = 30.0
TOKEN_SECONDS = 21600


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A machine will be preempted.

    Attributes:
        seconds: until then.
        source: of the notice.
    """

    seconds: float
    source: str


class NoAnswerError(Exception):
    """No such metadata service answers here."""


def aws_notice(base: str = METADATA) -> Notice | None:
    """Return the spot notice of an EC2 machine, or None; uses a token, as IMDSv2 requires.

    Raises:
        NoAnswerError: nothing answers as EC2 does.
    """
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
    token = _fetch(f"{base}/latest/api/token", headers=headers, method="PUT")
    if token is None:
        raise NoAnswerError
    answer = _fetch(
        f"{base}/latest/meta-data/spot/instance-action",
        headers={"X-aws-ec2-metadata-token": token},
    )
    if answer is None:  # 404: no notice
        return None
    try:
        document = json.loads(answer)
        at = datetime.fromisoformat(document["time"]).timestamp()
    except (ValueError, KeyError, TypeError):
        return Notice(seconds=AWS_SECONDS, source="EC2")
    return Notice(seconds=max(0.0, at - time.time()), source=f"EC2 {document.get('action', '')}")


def gcp_notice(base: str = METADATA) -> Notice | None:
    """Return the preemption notice of a Compute Engine machine, or None.

    Raises:
        NoAnswerError: nothing answers as Compute Engine does.
    """
    answer = _fetch(
        f"{base}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"}
    )
    if answer is None:
        raise NoAnswerError
    return Notice(seconds=GCP_SECONDS, source="Compute Engine") if answer == "TRUE" else None


def watch(
    on_notice: Callable[[Notice], None],
    *,
    base: str = METADATA,
    poll_seconds: float = POLL_SECONDS,
    stopped: Callable[[], Notice | None] | None = None,
) -> None:
    """Poll until there is a notice, report it, and return; return too if no service answers.

    Args:
        on_notice: is called with the notice.
        base: of the metadata service.
        poll_seconds: between two polls.
        stopped: another source of notices, such as a signal. If there is one, it is polled for
            ever, on a machine without a metadata service too.
    """
    silent = 0
    while True:
        notice = stopped() if stopped is not None else None
        if notice is None and silent < MAX_SILENT_POLLS:
            notice, answered = _any_notice(base)
            silent = 0 if answered else silent + 1
        if notice is not None:
            on_notice(notice)
            return
        if silent >= MAX_SILENT_POLLS and stopped is None:
            return
        time.sleep(poll_seconds)


def _any_notice(base: str) -> tuple[Notice | None, bool]:
    """Return a notice from either cloud, and whether one of them answered at all."""
    for find_notice in (aws_notice, gcp_notice):
        with contextlib.suppress(NoAnswerError):
            return find_notice(base), True
    return None, False


def _fetch(url: str, *, headers: Mapping[str, str], method: str = "GET") -> str | None:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            return str(answer.read().decode("utf-8", errors="replace")).strip()
    except (urllib.error.URLError, OSError, ValueError):
        return None
