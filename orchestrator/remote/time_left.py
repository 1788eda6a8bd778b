"""How long a running phase still takes, from what it has done so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from planners.simulation.simulate import Quantiles
from planners.units.kinds import PHASES, behind


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Where a run is.

    Attributes:
        name: such as ``calibrate``.
        done: units of it; of a training of the whole model, while it goes on, steps.
        total: likewise.
        begun: seconds since the epoch.
        planned: seconds that it was expected to take; 0 where nothing was.
        tokens_per_second: that pass the first stage; 0 where none do.
        seconds_left: at the rate so far; None where nothing is done yet.
    """

    name: str
    done: int
    total: int
    begun: float
    planned: float
    tokens_per_second: float
    seconds_left: float | None


def run_left(
    identity: Mapping[str, Any],
    forecast: Mapping[str, Any],
    ended: Mapping[str, float],
    phase: Phase | None,
) -> Quantiles | None:
    """Return how long the rest of a run of one or several steps takes; None if unknown."""
    if "steps" not in identity:
        return time_left(forecast.get("phases", {}), ended, phase)
    # Of several steps each has phases of the same names; the sum over all phases is known.
    totals = {q: forecast.get("seconds", {}).get(q) for q in ("p10", "p50", "p90")}
    if None in totals.values():
        return None
    spent = sum(ended.values())
    least = (phase.seconds_left or 0.0) if phase is not None else 0.0
    return Quantiles(**{q: max(least, seconds - spent) for q, seconds in totals.items()})


def time_left(
    expected: Mapping[str, Mapping[str, float]], ended: Mapping[str, float], phase: Phase | None
) -> Quantiles | None:
    """Return how long the rest of a run takes; None if there is no forecast.

    The rest of the running phase is extrapolated from its own rate. A phase that has not started
    takes its expected time, times the pace: measured over expected time of the phases that ended.
    As those may have had little to do, after a resume or with reused statistics, a quarter of the
    run at the expected pace is added to both. A phase that occurs twice, as the evaluation of both
    models, takes half of its expected time each time. The spread is that of the forecast.

    Args:
        expected: phase -> quantiles of its seconds.
        ended: phase -> seconds.
        phase: the running one.
    """
    if not expected:
        return None
    now = "" if phase is None else phase.name
    twice = {phase.name for phase in PHASES.values() if phase.times > 1}
    known = [name for name in expected if name in ended and name not in {now, *twice}]
    weight = sum(each["p50"] for each in expected.values()) / 4
    planned = sum(expected[name]["p50"] for name in known) + weight
    pace = (sum(ended[name] for name in known) + weight) / planned if planned else 1.0
    left = dict.fromkeys(("p10", "p50", "p90"), 0.0)
    for name, each in expected.items():
        if name in known or not each["p50"]:
            continue
        middle = each["p50"] * pace
        if name in twice and name in ended:
            middle *= 0.0 if {now, *ended} & set(behind(name)) else 0.5
        if phase is not None and name == now and phase.seconds_left is not None:
            again = middle / 2 if name in twice and name not in ended else 0.0
            middle = phase.seconds_left + again
        for quantile in left:
            left[quantile] += middle * each[quantile] / each["p50"]
    return Quantiles(**left)
