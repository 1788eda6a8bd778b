"""Recompute some layers of a run, with their own options."""

from collections.abc import Mapping
from typing import Any

from orchestrator.phases.open_run import check_run, write_plan
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.config import RunConfig
from orchestrator.run import run
from orchestrator.rundir import lease
from orchestrator.rundir.journal import Listener
from orchestrator.rundir.layout import READY
from planners.errors import ConfigError
from planners.units.kinds import KINDS


def with_overrides(config: RunConfig, layers: list[int], options: Mapping[str, str]) -> RunConfig:
    """Return a recipe in which some layers have their own options, added to those they had."""
    own = {layer: dict(values) for layer, values in config.layer_options.items()}
    for layer in layers:
        own[layer] = {**own.get(layer, {}), **options}
    kept = {layer: values for layer, values in sorted(own.items()) if values}
    return config.model_copy(update={"layer_options": kept})


def redo(
    config: RunConfig, layers: list[int], options: Mapping[str, str], *, listener: Listener
) -> dict[str, Any]:
    """Recompute layers of a run, verify the whole result again, and return the new report.

    Raises:
        ConfigError: see `changed`.
        CompressionError: see `planners.errors`; what is done is kept.
    """
    new = changed(config, layers, options)
    withdraw(new, layers)
    return run(new, listener=listener)


def changed(config: RunConfig, layers: list[int], options: Mapping[str, str]) -> Prepared:
    """Return the run with the new options of its layers; nothing is changed yet.

    Args:
        config: the recipe of the run.
        layers: which.
        options: of the method, for these layers only; without any they are recomputed unchanged.

    Raises:
        ConfigError: there is no such layer, or an option is not one that a layer can have alone.
    """
    if config.steps and options:
        raise ConfigError(
            f"--option {next(iter(options))}: {config.out} is a run of several steps, whose layers "
            "have no options of their own",
            hint="without --option they are recomputed unchanged",
        )
    old, new = prepare(config), prepare(with_overrides(config, layers, options))
    beyond = [layer for layer in layers if layer >= old.plan.shape.num_layers]
    if beyond:
        raise ConfigError(
            f"--layers {beyond[0]}: the model has layers 0 to {old.plan.shape.num_layers - 1}"
        )
    check_run(old)
    return new


def withdraw(new: Prepared, layers: list[int]) -> None:
    """Remove READY and the records of layers; the directory then holds the new run."""
    directory = new.run
    with lease.held(directory):
        directory.delete(READY)
        write_plan(new)
        made = [k for k in KINDS.values() if k.of == "layer" and k.phase in ("compress", "refit")]
        for unit in {kind.unit(layer) for kind in made for layer in layers}:
            directory.delete(f"records/{unit}.json")


def layers_of(text: str) -> list[int]:
    """Return the layers that ``17,20-22`` names, in order.

    Raises:
        ConfigError: it names none.
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            last = first
        if not first.isdecimal() or not last.isdecimal() or len(part) > len("9999-9999"):
            raise ConfigError(f"--layers {text}: must be layers and ranges, such as 17,20-22")
        found |= set(range(int(first), int(last) + 1))
    if not found:
        raise ConfigError(f"--layers {text}: names no layer")
    return sorted(found)
