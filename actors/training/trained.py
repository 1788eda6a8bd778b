"""Which tensors of a compressed model are trained, and what their rates are relative to."""

from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from actors.devices.transfer import whole
from actors.training.division import Division, is_divided, local
from planners.recovery import Recovery


def made(
    layer: nn.Module, dense: Mapping[str, Tensor], *, frozen: Container[str] = ()
) -> list[str]:
    """Return the tensors of a layer that a cut made, and its norms if there are any.

    A tensor was made if the dense layer has none of its name, or one of another shape or of other
    values.

    Args:
        layer: of the compressed model.
        dense: the tensors of the layer that it was made from, by their names below the layer.
        frozen: names of tensors that are not trained here.
    """

    def is_made(name: str, parameter: Tensor) -> bool:
        other = dense.get(name)
        if other is None or other.shape != parameter.shape:
            return True
        own = whole(parameter.detach())
        return not torch.equal(other.to(own), own)

    own = [(name, each) for name, each in layer.named_parameters() if name not in frozen]
    found = {name for name, each in own if is_made(name, each)}
    return sorted(found | set(_norms(layer))) if found else []


def _norms(layer: nn.Module) -> list[str]:
    """Return the tensors of whatever is no linear."""
    linears = {name for name, each in layer.named_modules() if isinstance(each, nn.Linear)}
    names = (name for name, _ in layer.named_parameters())
    return [name for name in names if name.rpartition(".")[0] not in linears]


def linears_of(layer: nn.Module, *, frozen: Container[str] = ()) -> dict[str, nn.Linear]:
    """Return name -> linear of a layer; of a linear in two factors each of them.

    Those whose weight is ``frozen`` are left out.
    """
    return {
        name: module
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" not in frozen
    }


def rms(tensor: Tensor) -> float:
    """Return the root mean square of a tensor, computed in float64."""
    return float(whole(tensor.detach()).to(torch.float64).square().mean().sqrt())


class Tensors:
    """Tensors of a model that are trained as they are.

    Attributes:
        parameters: name -> tensor; of one that is divided over workers the own rows.
        units: name -> what a relative rate is relative to: the root mean square of the tensor
            before it was trained.
        divided: name -> tensor, of those.
    """

    def __init__(
        self,
        module: nn.Module,
        names: list[str],
        recovery: Recovery,
        *,
        division: Division | None = None,
    ) -> None:
        """Let some tensors of a module have gradients; it may be divided over workers."""
        self._division = division
        found = {name: module.get_parameter(name) for name in sorted(names)}
        for parameter in found.values():
            parameter.requires_grad_()
        self.divided = {name: each for name, each in found.items() if is_divided(each)}
        own = {name: nn.Parameter(local(each.detach())) for name, each in self.divided.items()}
        self.parameters = {**found, **own}
        relative = recovery.relative
        self.units = {n: _unit(module, n) if relative else 1.0 for n in self.parameters}

    contexts = staticmethod(noop_context_fn)

    def begin_step(self) -> None:
        """Prepare for the parts of a step."""
        if self._division:
            self._division.begin_step()

    def begin_part(self, step: int, part: int) -> None:
        """Prepare for one of them."""
        del step, part
        for each in self.divided.values():
            each.grad = None  # the division has the sum of the parts before

    def end_part(self) -> None:
        """Prepare for anything but a part of a step."""

    def results(self) -> dict[str, Tensor]:
        """Return name -> value of all tensors of the model that were trained."""
        return {n: self.divided.get(n, each).detach() for n, each in self.parameters.items()}


def _unit(module: nn.Module, name: str) -> float:
    """Return the root mean square of a tensor; of one of zeros, as a new bias, its weight's."""
    owner, _, _ = name.rpartition(".")
    own = rms(module.get_parameter(name))
    beside = max((rms(p) for p in module.get_submodule(owner).parameters()), default=0.0)
    return own or beside or 1.0
