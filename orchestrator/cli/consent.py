"""Asking before money is spent: a cluster that somebody pays for is used only with consent."""

import sys
from collections.abc import Callable
from functools import partial

import click

from orchestrator.backend.ray_cluster import ClusterFacts, connected
from orchestrator.cli.plan import money_text
from orchestrator.forecast.forecast import Forecast
from planners.errors import ConfigError


def asker() -> Callable[[str], bool] | None:
    """Return who puts a question to the user, or None where nobody is there to answer."""
    return partial(click.confirm, err=True) if sys.stdin.isatty() else None


def costs_money(found: Forecast, facts: ClusterFacts) -> bool:
    """Return whether workers of a cluster are likely to be paid for.

    One that this command started itself costs nothing; another does if a price was given, or if its
    nodes have accelerators or are said to be spot capacity.
    """
    if facts.address == "local":
        return False
    return found.terms.price_per_hour is not None or facts.gpus > 0 or facts.spot


def require_consent(
    found: Forecast,
    facts: ClusterFacts,
    *,
    yes: bool,
    ask: Callable[[str], bool] | None,
    cost: str = "",
) -> None:
    """Return if the run may go on.

    Args:
        found: what the run comes to.
        facts: the cluster that it would use.
        yes: the answer was given beforehand.
        ask: puts a question to the user; None where nobody is there to answer.
        cost: what to say of time and money, where it is not the forecast's alone.

    Raises:
        ConfigError: the answer was no, or nobody can be asked.
    """
    if yes or not costs_money(found, facts):
        return
    where = f"{found.num_workers} workers of the cluster at {facts.address}"
    cost = cost or money_text(found)
    if ask is None:
        raise ConfigError(
            f"{where} may cost money ({cost}), and there is no terminal to ask for consent",
            hint="add --yes to start without asking",
        )
    if not ask(f"{where}: {cost}. Continue?"):
        raise ConfigError("nothing was started", hint="--yes starts without asking")


def ask_before(address: str, approve: Callable[[ClusterFacts], None]) -> None:
    """Let a cluster be approved before anything is changed for what is to be done on it.

    Raises:
        ClusterError: there is none at the address.
        ConfigError: it was not approved.
    """
    if address == "local":
        return  # it costs nothing, see `costs_money`
    with connected(address, num_cpus=0, num_gpus=0, store_bytes=0) as facts:
        approve(facts)
