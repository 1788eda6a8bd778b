"""Which matrices of a checkpoint are quantised, and how: from its config alone."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from actors.numerics.packing import PARTS, values_of
from planners.model.scheme import (
    FP8,
    GRIDS,
    INT,
    NVFP4,
    WHOLE_ROW,
    WORD,
    Scheme,
    arguments_of,
    scheme_of,
)

KEY = "quantization_config"
METHOD = "compressed-tensors"
MIXED = "mixed-precision"  # the format of a config whose groups have several


def quantisation_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Return what a config says of quantised matrices.

    Args:
        schemes: module, by its full name, -> how its matrix is quantised.
    """
    modules: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        modules.setdefault(scheme, []).append(name)
    groups: dict[str, dict[str, Any]] = {}
    for number, scheme in enumerate(sorted(modules)):
        groups[f"group_{number}"] = {
            # Exact names: with classes a loader may take the scheme of another group.
            "targets": sorted(modules[scheme]),
            "weights": arguments_of(scheme),
            "format": GRIDS[scheme.grid].packing,
        }
    formats = [*dict.fromkeys(group["format"] for group in groups.values())]
    return {
        "quant_method": METHOD,
        "format": formats[0] if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


def schemes_in(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Return module -> scheme of a config that `quantisation_config` was written into.

    Empty for a model that is not quantised, or was by a program that does not name every module.
    """
    found = config.get(KEY)
    groups = found.get("config_groups") if isinstance(found, Mapping) else None
    if not isinstance(groups, Mapping):
        return {}
    try:
        named = {
            str(name): scheme_of(group["weights"])
            for group in groups.values()
            for name in group["targets"]
        }
    except (KeyError, TypeError, ValueError):
        return {}
    return {} if any(":" in name or name[:1].isupper() for name in named) else named


def part_names(module: str, scheme: Scheme) -> tuple[str, ...]:
    """Return the tensors in which a quantised matrix is stored."""
    parts = PARTS[scheme.grid]
    return tuple(
        f"{module}.{part}" for part in parts if part != "weight_zero_point" or not scheme.symmetric
    )


def part_shapes(scheme: Scheme, dims: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return part -> shape of a quantised matrix of (rows, width); empty if groups do not fit."""
    rows, width = dims
    groups = scheme.groups(width)
    if scheme.group != WHOLE_ROW and groups * scheme.group != width:
        return {}
    scales = {"weight_scale": (rows, groups)}
    if scheme.grid == FP8:
        return {**scales, "weight": dims}
    if scheme.grid != INT:
        common = {"weight_global_scale": (1,)} if scheme.grid == NVFP4 else {}
        return {**scales, **common, "weight_packed": (rows, width // 2)}
    found = {**scales, "weight_packed": (rows, -(-width * scheme.bits // WORD)),
             "weight_shape": (2,)}  # fmt: skip
    if not scheme.symmetric:
        found["weight_zero_point"] = (-(-rows * scheme.bits // WORD), groups)
    return found


def decoded(tensors: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> dict[str, Tensor]:
    """Return tensors with the weights of quantised matrices in place of their parts, in float32."""
    found = dict(tensors)
    for module, scheme in schemes.items():
        names = part_names(module, scheme)
        parts = {name.removeprefix(f"{module}."): found.pop(name) for name in names}
        found[f"{module}.weight"] = values_of(parts, scheme)
    return found
