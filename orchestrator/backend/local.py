"""The executor that runs everything in this process, for tests and small work."""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.messages import TrainRequest
from orchestrator.backend.executor import ActorLocation, Resources, Training


class LocalExecutor:
    """Runs every call at once in this process: for tests and debugging."""

    def spawn(self, actor_class: type, *args: Any, resources: Resources, name: str) -> Any:
        """Return the object itself; ``resources`` do not matter here."""
        del resources, name
        return actor_class(*args)

    def locate(self, handle: Any) -> Any:
        """Return a finished ticket: the actor is in this process."""
        del handle
        return _Answer(ActorLocation())

    def call(self, handle: Any, method: str, *args: Any, num_returns: int = 1, label: str) -> Any:
        """Run the call now and return its finished tickets."""
        del label
        values = [arg.value if isinstance(arg, _Answer) else arg for arg in args]
        try:
            answer = getattr(handle, method)(*values)
        except Exception as error:  # noqa: BLE001 as on Ray: raised by `result`
            tickets = tuple(_Answer(None, error) for _ in range(num_returns))
            return tickets[0] if num_returns == 1 else tickets
        if num_returns == 1:
            return _Answer(answer)
        return tuple(_Answer(part) for part in answer)

    def ready(self, tickets: Sequence[Any], *, seconds: float) -> list[Any]:
        """Return all tickets: every call has answered."""
        del seconds
        return list(tickets)

    def result(self, ticket: Any) -> Any:
        """Return the answer."""
        if ticket.error is not None:
            raise ticket.error
        return ticket.value

    def train(
        self,
        request: TrainRequest,
        *,
        num_workers: tuple[int, int],
        resources: Resources,
        name: str,
    ) -> Training:
        """Train the model now, and return the finished training."""
        del num_workers, resources, name
        from actors.training.group import Alone  # most runs train nothing
        from actors.training.loop import train

        try:
            train(request, Alone())
        except Exception as error:  # noqa: BLE001 as on Ray: raised by `Training.result`
            return _Trained(error)
        return _Trained()

    def kill(self, handle: Any) -> None:
        """Do nothing: the object is in this process."""

    def kill_process(self, where: ActorLocation) -> None:
        """Do nothing: it is this process."""

    def stack(self, where: ActorLocation) -> str:
        """Return an empty text: calls run in this process and have returned."""
        del where
        return ""

    def draining(self) -> Mapping[str, float]:
        """Return nothing: there are no nodes."""
        return {}

    def request_resources(self, bundles: Sequence[Mapping[str, float]]) -> None:
        """Do nothing: there is no cluster that could grow."""

    def capacity(self) -> str:
        """Return an empty text: resources are not limited here."""
        return ""


class _Answer:
    """A ticket of the local executor; compared and hashed by identity."""

    def __init__(self, value: Any, error: Exception | None = None) -> None:
        self.value, self.error = value, error


class _Trained:
    """A training that has ended."""

    def __init__(self, error: Exception | None = None) -> None:
        self._error = error

    def done(self) -> bool:
        return True

    def result(self) -> None:
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Do nothing: it has ended."""
