"""Detect calls that do not answer, report their stack traces, and say when to give them up."""

import time
from dataclasses import dataclass
from typing import Any

from orchestrator.engine.worker_pool import Pool


@dataclass(slots=True)
class _Call:
    """A call that has not answered, since it was made or the one before it answered."""

    ticket: Any
    kind: str
    label: str
    since: float
    reported: bool = False


class PendingCalls:
    """The unanswered calls on each slot, in order; a worker is doing the first of them."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._calls: dict[int, list[_Call]] = {}

    def begins(self, slot: int, ticket: Any, kind: str, label: str) -> None:
        """Record a call that was made."""
        self._calls.setdefault(slot, []).append(_Call(ticket, kind, label, time.monotonic()))

    def answered(self, slot: int, ticket: Any, *, counts: bool = True) -> None:
        """Record that a call has answered, and, if it ``counts``, how long its kind takes."""
        now = time.monotonic()
        calls = self._calls.get(slot, [])
        for number, call in enumerate(calls):
            if call.ticket == ticket:
                if number == 0:
                    if counts:
                        self._pool.deadlines.took(call.kind, now - call.since)
                    for waiting in calls[1:2]:
                        waiting.since = now
                del calls[number]
                return

    def took(self, kind: str, seconds: float) -> None:
        """Record how long work of a kind took that needs two calls."""
        self._pool.deadlines.took(kind, seconds)

    def forget(self, slot: int) -> None:
        """Forget all calls on a slot."""
        self._calls.pop(slot, None)

    def label(self, slot: int) -> str:
        """Return the label of the call that the worker of a slot is doing."""
        return self._calls[slot][0].label

    def ticket(self, slot: int) -> Any:
        """Return the ticket of the call that the worker of a slot is doing."""
        return self._calls[slot][0].ticket

    def fits(self, slot: int, left: float) -> bool:
        """Return whether a worker's current call is likely to end within ``left`` seconds."""
        calls = self._calls.get(slot)
        if not calls:
            return False
        ago = time.monotonic() - calls[0].since
        return self._pool.deadlines.fits(calls[0].kind, begun_seconds_ago=ago, left=left)

    def late(self, slot: int) -> bool:
        """Return whether a call is late; the first time, report its process's stack trace."""
        call = self._first(slot)
        if call is None or not self._silent(call) > self._pool.deadlines.limit(call.kind):
            return False
        if not call.reported:
            call.reported = True
            self._pool.report_stalled(slot, call.label, seconds=self._silent(call))
        return True

    def stalled(self, slot: int) -> bool:
        """Return whether a call is so late that its worker should be replaced."""
        call = self._first(slot)
        if call is None or not self.late(slot):
            return False
        return self._silent(call) > 2 * self._pool.deadlines.limit(call.kind)

    def _first(self, slot: int) -> _Call | None:
        calls = self._calls.get(slot)
        if not calls:
            return None
        if not self._pool.is_running(slot):
            calls[0].since = time.monotonic()  # its worker has not started yet
            return None
        return calls[0]

    def _silent(self, call: _Call) -> float:
        return time.monotonic() - call.since
