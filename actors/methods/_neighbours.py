"""What a method that shares tensors among layers is given of the other layers."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from planners.model.form import LayerForm


@runtime_checkable
class Neighbours(Protocol):
    """The layers with which one layer shares tensors; tensors are keyed by their roles."""

    @property
    def takers(self) -> Mapping[int, LayerForm]:
        """The layers that take factors from this one, in order, with their forms."""

    def weights(self, layer: int) -> Mapping[str, Tensor]:
        """Return the tensors of another layer of the step's input model."""

    def sums(self, layer: int) -> Mapping[str, Tensor]:
        """Return the statistics of a taker."""

    def stored(self, layer: int) -> Mapping[str, Tensor]:
        """Return what the result stores of the layer from which this one takes factors."""
