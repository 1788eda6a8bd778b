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
    dense_start,
    layer_parameters,
    linear_dims,
    linear_weights,
    model_parameters,
)
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that a result may cost, and how cost is counted.

    Attributes:
        limit: the most that the whole model may cost.
        layer: the cost of a layer.
        outside: the cost of all but the layers.
        module: the part of a layer's cost that depends on the width of a module, qk, vo or mlp.
        refuse: raises the error for a budget that cannot be met, given the least possible cost.
    """

    limit: float
    layer: Callable[[LayerForm], float]
    outside: Callable[[ModelForm], float]
    module: Callable[[LayerForm, str], float]
    refuse: Callable[[float], NoReturn]

    def cost(self, form: ModelForm) -> float:
        """Return the cost of a whole model."""
        return self.outside(form) + sum(map(self.layer, form.layers))

    def allows(self, form: ModelForm) -> bool:
        """Return whether a model is within the budget."""
        return self.cost(form) <= self.limit


def budget_of(shape: ModelShape, start: Start, target: Target) -> Budget:
    """Return the budget that a target sets."""
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


def module_elements(shape: ModelShape, layer: LayerForm, module: str) -> int:
    """Return the elements of a module, without the biases of v and o, which a cut may move."""
    roles = [role for role in shape.kind(layer).roles if role in LINEARS_OF[module]]
    total = sum(linear_weights(shape, layer, role) for role in roles)
    if module == "vo":
        return total
    cut = [role for role in roles if role in layer.biases and role != "down_proj"]
    return total + sum(linear_dims(shape, layer, role)[0] for role in cut)
