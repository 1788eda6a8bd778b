"""Format numbers for people; a value that was not measured is a dash, never a zero."""

import math
from datetime import datetime

MISSING = "\u2013"
NBSP = "\u00a0"
TIMES = "\u00d7"
MINUS = "\u2212"

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_COUNT_UNITS = ("", "k", "M", "B", "T", "P", "E", "Z")
_FLOP_UNITS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP")
_STEP = 1000.0
_MINUTE = 60.0
_WITH_SECONDS = 600.0  # longer durations are shown without seconds
_DECIMAL_BELOW = 10.0


def number(value: object) -> float | None:
    """Return the value as a finite float, or None if it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: object) -> str:
    """Return an integer with thousands separated: ``1,239,040``."""
    found = number(value)
    return MISSING if found is None else f"{round(found):,}"


def counted(value: int, noun: str) -> str:
    """Return a count with its noun: ``1 layer``, ``80 layers``."""
    return f"{value:,}{NBSP}{noun}" + ("" if value == 1 else "s")


def between(low: str, high: str) -> str:
    """Return a range of formatted numbers: ``between 1 % and 2 %``, or the one number."""
    return low if low == high else f"between {low} and {high}"


def short_count(value: object) -> str:
    """Return a count with three significant digits: ``1.24 M``; a billion is ``B``."""
    return _scaled(value, _COUNT_UNITS)


def bytes_text(value: object) -> str:
    """Return bytes with three significant digits in decimal units: ``4.96 MB``.

    Used for memory, files and transfers, as sizes of models and devices are given so; only options
    in GiB are shown in GiB.
    """
    return _scaled(value, _BYTE_UNITS)


def flops_text(value: object) -> str:
    """Return floating point operations with three significant digits: ``162 GFLOP``."""
    return _scaled(value, _FLOP_UNITS)


def short_tick(value: float) -> str:
    """Return a count for an axis, without unneeded digits: ``60 k``."""
    scaled, unit = _step_down(value, _COUNT_UNITS)
    return f"{scaled:.4g}{NBSP}{unit}".rstrip()


def time_text(text: str) -> str:
    """Return an ISO time as ``2026-03-14 09:26 UTC``; any other text unchanged."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = moment.tzname() or ""
    return f"{moment:%Y-%m-%d %H:%M} {zone}".rstrip()


def seconds_text(value: object) -> str:
    """Return a duration: ``0.42 s``, ``12.3 s``, ``3 min 20 s``, ``49 min``, ``2 h 05 min``."""
    found = number(value)
    if found is None:
        return MISSING
    if found < _DECIMAL_BELOW:
        return f"{found:.2f}{NBSP}s"
    if found < _MINUTE:
        return f"{found:.1f}{NBSP}s"
    if found < _WITH_SECONDS:
        minutes, seconds = divmod(round(found), 60)
        return f"{minutes}{NBSP}min {seconds:02d}{NBSP}s"
    if round(found / _MINUTE) < _MINUTE:
        return f"{round(found / _MINUTE)}{NBSP}min"
    hours, minutes = divmod(round(found / _MINUTE), 60)
    return f"{hours}{NBSP}h {minutes:02d}{NBSP}min"


def percent(fraction: object, *, digits: int = 1) -> str:
    """Return a fraction of 0 to 1 as ``84.7 %``."""
    found = number(fraction)
    return MISSING if found is None else f"{found * 100:.{digits}f}{NBSP}%"


def kept_percent(fraction: object) -> str:
    """Return a fraction close to 1 with as many digits as distinguish it from 1."""
    found = number(fraction)
    if found is None:
        return MISSING
    for digits in (1, 2, 3):
        if f"{found * 100:.{digits}f}" != f"{100:.{digits}f}":
            return percent(found, digits=digits)
    return percent(found)


def decimal(value: object) -> str:
    """Return a measured value with four significant digits, zeros too, thousands separated."""
    found = number(value)
    if found is None:
        return MISSING
    if float(f"{abs(found):.4g}") >= _STEP:
        return f"{found:,.0f}"
    return f"{found:#.4g}"


def quotient(after: object, before: object) -> float | None:
    """Return after / before, or None if either is unknown or before is 0."""
    top, bottom = number(after), number(before)
    return None if top is None or not bottom else top / bottom


def times(ratio: float | None) -> str:
    """Return a ratio as ``0.85x`` with a proper multiplication sign."""
    return MISSING if ratio is None else f"{ratio:.2f}{TIMES}"


def change(ratio: float | None) -> str:
    """Return a ratio as a signed change: ``+9.9 %``, ``-15.3 %`` with a proper minus sign."""
    if ratio is None:
        return MISSING
    if abs(ratio - 1.0) > _DECIMAL_BELOW:
        return times(ratio)
    text = f"{(ratio - 1.0) * 100:+.1f}"
    if text.strip("+-") == "0.0":
        text = "0.0"
    return text.replace("-", MINUS) + f"{NBSP}%"


def _scaled(value: object, units: tuple[str, ...]) -> str:
    found = number(value)
    if found is None:
        return MISSING
    scaled, unit = _step_down(found, units)
    text = f"{scaled:.0f}" if unit == units[0] else f"{scaled:.{_digits(scaled)}f}"
    return f"{text}{NBSP}{unit}" if unit else text


def _step_down(value: float, units: tuple[str, ...]) -> tuple[float, str]:
    step = 0
    while abs(value) >= _STEP and step < len(units) - 1:
        value, step = value / _STEP, step + 1
    return value, units[step]


def _digits(value: float) -> int:
    """Return the number of decimals for three significant digits of a value below 1000."""
    return max(0, 2 - math.floor(math.log10(abs(value))))
