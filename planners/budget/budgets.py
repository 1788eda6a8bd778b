"""What a result may cost: the sum over its layers and the rest, of parameters or of something else.

Every allocation spends such a budget, so that it does not know what is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from planners.errors import PlanError
from planners.method import Target
from planners.model.cost import (
    BYTES_OF,
    dense_model_form,
    dense_start,
    layer_bytes,
    layer_parameters,
    linear_bits,
    linear_dims,
    linear_weights,
    matrices,
    model_parameters,
    outside_bytes,
    stored_width,
)
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.modules import LINEARS_OF
from planners.model.serving_load import LayerTimes, seconds_at
from planners.model.shape import ModelShape

FEW_MB = 100  # below it a megabyte is too coarse for a size to be named


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a result may cost, and how cost is counted.

    Attributes:
        limit: the most that the whole model may cost.
        layer: the cost of a layer.
        outside: the cost of all but the layers.
        module: the part of a layer's cost that depends on the width of a module, qk, vo or mlp.
        fills: what is left of it at the end is spent, too.
        ties_heads: cost depends on the wider of q/k and v/o heads, so both are cut to one width.
        refuse: raises the error for a budget that cannot be met, given the least possible cost.
    """

    limit: float
    layer: Callable[[LayerForm], float]
    outside: Callable[[ModelForm], float]
    module: Callable[[LayerForm, str], float]
    refuse: Callable[[float], NoReturn]
    ties_heads: bool = False
    fills: bool = False

    def cost(self, form: ModelForm) -> float:
        """Return the cost of a whole model."""
        return self.outside(form) + sum(map(self.layer, form.layers))

    def allows(self, form: ModelForm) -> bool:
        """Return whether a model is within the budget."""
        return self.cost(form) <= self.limit


def _refuse_nothing(least: float) -> NoReturn:
    raise AssertionError(f"{least} is within no limit")


# Of a plan whose widths follow from times that are not measured yet: it counts with uncut layers.
UNLIMITED = Budget(
    limit=math.inf,
    layer=lambda _: 0.0,
    outside=lambda _: 0.0,
    module=lambda *_: 0.0,
    refuse=_refuse_nothing,
)


def budget_of(shape: ModelShape, start: Start, target: Target) -> Budget:
    """Return the budget that a target sets."""
    if target.speedup is not None:
        if target.times is None:
            return UNLIMITED
        return seconds(target.times, target.speedup, start)
    if target.fit is not None:
        return memory(shape, target)
    if target.keep_bytes is not None:
        return stored(shape, target.keep_bytes, start)
    if target.bits is not None:
        return mean_bits(shape, target.bits, start)
    return parameters(shape, target.keep_fraction or 1.0, start)


def parameters(shape: ModelShape, keep_fraction: float, start: Start | None = None) -> Budget:
    """Return the budget of a fraction of the parameters of the run's input model.

    Args:
        shape: of the model.
        keep_fraction: target, true counts of the whole model.
        start: the model that is cut; the uncompressed one if None.
    """
    before = (start or dense_start(shape)).parameters_before

    def refuse(least: float) -> NoReturn:
        smallest = least / before
        raise PlanError(
            f"keep_fraction {keep_fraction} cannot be met: the smallest result of this method "
            f"keeps {smallest:.4f} of the parameters",
            hint=f"use --keep-fraction {smallest + 5e-5:.4f} or more",
        )

    return Budget(
        # The tolerance is for fractions that a float does not hold.
        limit=math.floor(keep_fraction * before + 1e-6),
        layer=lambda layer: layer_parameters(shape, layer),
        outside=lambda form: (
            model_parameters(shape, form) - sum(layer_parameters(shape, f) for f in form.layers)
        ),
        module=lambda layer, module: module_elements(shape, layer, module),
        refuse=refuse,
    )


def memory(shape: ModelShape, target: Target) -> Budget:
    """Return the budget of bytes that weights, keys and values, and workspace may take together.

    Keys and values are those of the load in the dtype of the weights.
    """
    load = target.load
    width, tokens = BYTES_OF[shape.dtype], load.batch * load.context

    def cached(head_dim: int) -> int:
        return tokens * shape.num_kv_heads * head_dim * width

    def held(layer: LayerForm) -> float:
        return layer_bytes(shape, layer, width=width) + cached(
            layer.qk_head_dim + layer.vo_head_dim
        )

    def module(layer: LayerForm, name: str) -> float:
        if layer.schemes or name not in LINEARS_OF:
            return held(layer)
        heads = {"qk": layer.qk_head_dim, "vo": layer.vo_head_dim}.get(name, 0)
        return module_elements(shape, layer, name) * width + cached(heads)

    def refuse(least: float) -> NoReturn:
        raise PlanError(
            f"fit: {target.fit:,} bytes are too few: the smallest result of this method needs "
            f"{math.ceil(least):,} for weights, keys and values of {load.batch} x {load.context} "
            "tokens, and workspace",
            hint=f"use --fit {_rounded_up(least)} or more, or a smaller --serving-batch or "
            "--serving-context",
        )

    return Budget(
        limit=float(target.fit or 0),
        layer=held,
        outside=lambda form: outside_bytes(shape, form) + target.workspace,
        module=module,
        refuse=refuse,
    )


def stored(shape: ModelShape, keep_bytes: int, start: Start) -> Budget:
    """Return the budget of bytes that all tensors of the result take as they are stored."""
    width = stored_width(shape, start.form)

    def layer(form: LayerForm) -> float:
        return layer_bytes(shape, form, width=width)

    def refuse(least: float) -> NoReturn:
        raise PlanError(
            f"keep_bytes: {keep_bytes:,} bytes are too few: the smallest result of these options "
            f"has {math.ceil(least):,}",
            hint=f"use --keep-bytes {_rounded_up(least)} or more; or {_cheaper(shape, start)}",
        )

    return Budget(
        limit=float(keep_bytes),
        layer=layer,
        outside=lambda form: outside_bytes(shape, form),
        module=lambda form, _: layer(form),
        refuse=refuse,
        fills=True,
    )


def mean_bits(shape: ModelShape, bits: float, start: Start) -> Budget:
    """Return the budget of bits for each weight of the linears of the input, scales included."""
    width = stored_width(shape, start.form)
    weights = sum(
        rows * columns
        for layer in dense_model_form(shape).layers
        for rows, columns in matrices(shape, layer).values()
    )

    def layer(form: LayerForm) -> float:
        return linear_bits(shape, form, width=width)

    def refuse(least: float) -> NoReturn:
        smallest = math.ceil(100 * least / weights) / 100
        raise PlanError(
            f"bits: {bits:g} a weight are too few: the smallest result of these options has "
            f"{smallest:g}, scales included",
            hint=f"use --bits {smallest:g} or more; or fewer bits or wider groups in the option "
            "schemes, such as 2/64",
        )

    return Budget(
        limit=bits * weights * (1 + 1e-12),
        layer=layer,
        outside=lambda _: 0.0,
        module=lambda form, _: layer(form),
        refuse=refuse,
        fills=True,
    )


def _cheaper(shape: ModelShape, start: Start) -> str:
    """Return what else makes a result smaller."""
    if stored_width(shape, start.form) > BYTES_OF["bfloat16"]:
        return "--dtype bfloat16, as what is not quantised is stored in float32"
    return "fewer bits or wider groups in the option schemes, such as 2/64"


def seconds(times: LayerTimes, speedup: float, start: Start) -> Budget:
    """Return the budget of time, of which the input model takes ``speedup`` times as much."""

    def layer(form: LayerForm) -> float:
        return times.layer(form.intermediate, max(form.qk_head_dim, form.vo_head_dim))

    def module(form: LayerForm, name: str) -> float:
        if name == "mlp":
            return seconds_at(times.mlp, form.intermediate)
        return seconds_at(times.heads, max(form.qk_head_dim, form.vo_head_dim))

    whole = times.outside + sum(map(layer, start.form.layers))

    def refuse(least: float) -> NoReturn:
        most = math.floor(1000 * whole / least) / 1000
        raise PlanError(
            f"speedup {speedup:g} cannot be reached: the fastest result of this method is "
            f"{most:g} times as fast as its input",
            hint=f"use --speedup {most:g} or less, or another --serving-phase, --serving-batch or "
            "--serving-context",
        )

    return Budget(
        limit=whole / speedup * (1 + 1e-9),  # sums in another order round differently
        layer=layer,
        outside=lambda _: times.outside,
        module=module,
        refuse=refuse,
        ties_heads=True,
    )


def _rounded_up(least: float) -> str:
    """Return a number of bytes as a size that is not smaller."""
    megabytes = math.ceil(least / 1e6)
    return f"{megabytes}MB" if megabytes > FEW_MB else f"{math.ceil(least / 1e3)}kB"


def module_elements(shape: ModelShape, layer: LayerForm, module: str) -> int:
    """Return the elements of a module, without the biases of v and o, which a cut may move."""
    roles = [role for role in shape.kind(layer).roles if role in LINEARS_OF[module]]
    total = sum(linear_weights(shape, layer, role) for role in roles)
    if module == "vo":
        return total
    cut = [role for role in roles if role in layer.biases and role != "down_proj"]
    return total + sum(linear_dims(shape, layer, role)[0] for role in cut)
