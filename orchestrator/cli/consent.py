"""Asking before money is spent: a cluster that may be billed is used only with consent."""

import sys
from collections.abc import Callable
from functools import partial

import click

from orchestrator.backend.ray_cluster import ClusterFacts, connected
from orchestrator.cli.plan import money_text
from orchestrator.forecast.forecast import Forecast
from planners.errors import ConfigError


def asker() -> Callable[[str], bool] | None:
    """Return a function that asks the user, or None without a terminal."""
    return partial(click.confirm, err=True) if sys.stdin.isatty() else None


def costs_money(found: Forecast, facts: ClusterFacts) -> bool:
    """Return whether workers of a cluster are likely to be billed.

    A Ray that this command started costs nothing; another cluster does if a price was given, or if
    its nodes have accelerators or are marked as spot capacity.
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
    """Return if the run may start.

    Args:
        found: the forecast of the run.
        facts: the cluster that it would use.
        yes: consent was given beforehand.
        ask: asks the user; None without a terminal.
        cost: text on time and money, if it is not that of the forecast.

    Raises:
        ConfigError: the answer was no, or there is no terminal.
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
    """Have a cluster approved before anything is changed.

    Raises:
        ClusterError: there is no cluster at the address.
        ConfigError: it was not approved.
    """
    if address == "local":
        return  # it costs nothing, see `costs_money`
    with connected(address, num_cpus=0, num_gpus=0, store_bytes=0) as facts:
        approve(facts)
