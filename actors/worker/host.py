"""The process of an actor, which can start before it is known what the actor is for."""

import traceback
from importlib import import_module
from typing import Any


class Host:
    """Holds an actor, and calls it.

    A plain class; the executor turns it into a Ray actor. It imports nothing by itself.
    """

    _actor: Any = None

    def __init__(self, what: "type | str", *args: Any, shown: str = "") -> None:
        """Build an actor of a class; or only import a module, until `build` is called.

        ``shown`` is what Ray shows of an actor that is built later: it asks once, at the start.
        """
        self._shown = shown
        if isinstance(what, str):
            import_module(what)
        else:
            self._actor = what(*args)

    def __repr__(self) -> str:
        """Return the name shown in Ray's dashboard and log prefixes."""
        return self._shown if self._actor is None else repr(self._actor)

    def build(self, actor_class: type, *args: Any) -> None:
        """Build the actor; where that fails the process ends, as one does that never started."""
        try:
            self._actor = actor_class(*args)
        except Exception as error:  # nobody waits for this call: else its error were lost
            traceback.print_exc()  # into this worker's log
            raise SystemExit(1) from error

    def call(self, method: str, *args: Any) -> Any:
        """Return what a method of the actor returns."""
        return getattr(self._actor, method)(*args)
