"""A batch file: read, checked, merged into recipes."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from actors.storage.files import Directory
from orchestrator.phases.open_run import check_run
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import SINGLE, RunConfig, size_text
from orchestrator.recipe.reading import load_config
from orchestrator.recipe.wording import printable
from orchestrator.rundir.statistics import IDENTITY
from planners.errors import CompressionError, ConfigError
from planners.method import SIZES, Option, Target
from planners.spelling import did_you_mean

KEYS = ("out", "budget", "defaults", "runs")
BUDGET_KEYS = ("hours", "money", "price_per_worker_hour")
MANY = (
    "model",
    "method",
    "keep_fraction",
    "slice",
    "keep_bytes",
    "bits",
)  # may be lists: every combination is a run
MAX_RUNS = 1000


@dataclass(slots=True)
class Spent:
    """What the runs of a batch have used so far."""

    seconds: float = 0.0
    worker_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The budget of a batch, for all its drivers together.

    Attributes:
        hours: of wall-clock time while runs go on; None is as long as it takes.
        money: in the currency of the price; None is as much as it takes.
        price_per_worker_hour: of one worker; 0 where it is not known.
    """

    hours: float | None = None
    money: float | None = None
    price_per_worker_hour: float = 0.0

    def left(self, spent: "Spent") -> float:
        """Return the share of the budget that is left, at most 1; 0 or less where it is spent."""
        shares = [1.0]
        if self.hours is not None:
            shares.append(1 - spent.seconds / 3600 / self.hours)
        if self.money is not None:
            shares.append(1 - spent.worker_seconds / 3600 * self.price_per_worker_hour / self.money)
        return min(shares)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One run of a batch.

    Attributes:
        name: of its folder below the batch's.
        where: which entry of the file it is from.
        priority: higher comes earlier.
        prepared: checked and ready to start.
    """

    name: str
    where: str
    priority: int
    prepared: Prepared

    @property
    def calibration(self) -> tuple[Any, ...]:
        """Key of the runs that can share statistics; a run of several steps shares none."""
        if self.prepared.former:
            return (self.name,)
        facts = self.prepared.facts
        return tuple(facts[key] for key in IDENTITY)


@dataclass(slots=True)
class Batch:
    """A checked batch file: nothing in it can fail for a reason known beforehand.

    Attributes:
        out: that all runs go below.
        budget: what they may use.
        entries: in the order in which they are done.
        expected: run -> what it is to take, where that was forecast.
        shared: run -> ``own``, or the run whose statistics it uses.
        errors: run -> why it failed.
        spent: so far.
    """

    out: str
    budget: Budget
    entries: Sequence[Entry]
    expected: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    spent: Spent = field(default_factory=Spent)


def read_batch(path: str) -> Batch:
    """Return a batch whose every run has been prepared.

    Raises:
        CompressionError: a run cannot be done; the message names its entry.
    """
    file = _mapping_of(path)
    unknown = min((str(key) for key in file if key not in KEYS), default=None)
    if unknown is not None:
        raise ConfigError(
            f"{path}: {printable(unknown)}: unknown key; known: {', '.join(KEYS)}"
            + did_you_mean(unknown, KEYS),
            hint="compress-cluster batch --help shows a file",
        )
    if not isinstance(file.get("out"), str) or not file["out"]:
        raise ConfigError(f"{path}: out: must be the directory for all runs")
    budget = _budget(path, file.get("budget", {}))
    runs = file.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ConfigError(f"{path}: runs: must be a list with at least one entry")
    out = Directory(file["out"])
    entries: dict[str, Entry] = {}
    for number, given in enumerate(runs, start=1):
        where = f"{path}: runs, entry {number}"
        for entry in _entries(where, out, file.get("defaults", {}), given):
            if entry.name in entries:
                raise ConfigError(
                    f"{where}: {entry.name} is already a run of {entries[entry.name].where}",
                    hint="remove one, or give it its own `out`",
                )
            entries[entry.name] = entry
        if len(entries) > MAX_RUNS:
            raise ConfigError(f"{where}: more than {MAX_RUNS} runs")
    # A stable sort: within a priority, runs of one calibration follow each other.
    groups = list(dict.fromkeys(entry.calibration for entry in entries.values()))
    ordered = sorted(
        entries.values(), key=lambda e: (-e.priority, groups.index(e.calibration))
    )  # fmt: skip
    return Batch(out=out.uri, budget=budget, entries=ordered)


def _entries(where: str, out: Directory, defaults: object, given: object) -> Iterator[Entry]:
    values = _merged(where, defaults, given)
    priority, own = values.pop("priority", 0), values.pop("out", None)
    if not isinstance(priority, int):
        raise ConfigError(f"{where}: priority: is {priority!r}; it must be a whole number")
    many = {k: v if isinstance(v, list) else [v] for k, v in values.items() if k in MANY}
    if own is not None and any(len(choices) != 1 for choices in many.values()):
        raise ConfigError(f"{where}: out: names one directory, but this entry is several runs")
    for choice in itertools.product(*many.values()):
        recipe = {**values, **dict(zip(many, choice, strict=True))}
        try:
            config = load_config(None, recipe)
            name = own or _name(config)
            prepared = prepare(config.model_copy(update={"out": out.below(name)}))
            check_run(prepared)  # a READY run is not started, so nothing else checks it
        except CompressionError as error:
            raise type(error)(f"{where}: {error}", hint=error.hint) from error
        yield Entry(name=name, where=where, priority=priority, prepared=prepared)


def _merged(where: str, defaults: object, given: object) -> dict[str, Any]:
    """Return an entry on top of the defaults; its own kind of size replaces theirs."""
    if not isinstance(defaults, dict) or not isinstance(given, dict):
        raise ConfigError(
            f"{where}: this entry and defaults must be mappings with keys of a recipe"
        )
    if "stats" in given or "stats" in defaults:
        raise ConfigError(f"{where}: stats: a batch shares its own statistics; remove it")
    left_out = set(SIZES) if set(SIZES) & given.keys() else set()
    if "steps" in given:
        left_out = set(SINGLE)
    elif set(SINGLE) & given.keys():
        left_out.add("steps")
    return {**{k: v for k, v in defaults.items() if k not in left_out}, **given}


def _name(config: RunConfig) -> str:
    model = re.sub(r"[^A-Za-z0-9.]+", "-", config.model.rstrip("/").rpartition("/")[2]).strip("-")
    steps = zip(config.chain, config.targets, strict=True)
    return "-".join(
        [model, *(f"{step.method}-{_size(target, step.options)}" for step, target in steps)]
    )


def _size(target: Target, options: Mapping[str, Option]) -> str:
    if not target.asked or "keep_bytes" in target.asked:
        return size_text(target, options)
    ((name, size),) = target.asked.items()
    return f"{name.removesuffix('_fraction')}{size:g}"


def _budget(path: str, given: object) -> Budget:
    if not isinstance(given, dict) or set(given) - set(BUDGET_KEYS):
        raise ConfigError(f"{path}: budget: must be a mapping of {', '.join(BUDGET_KEYS)}")
    for key, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{path}: budget.{key}: is {value!r}; it must be a number above 0")
    if "money" in given and "price_per_worker_hour" not in given:
        raise ConfigError(f"{path}: budget.money: needs budget.price_per_worker_hour")
    return Budget(**given)


def _mapping_of(path: str) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="give a batch file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: must be a mapping with: {', '.join(KEYS)}")
    if "runs" not in found and found.keys() & (RunConfig.model_fields.keys() - {"out"}):
        raise ConfigError(
            f"{path}: is a recipe, of one run", hint=f"compress-cluster run -r {path}"
        )
    return found
