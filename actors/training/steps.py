"""Steps of AdamW with a rate for each tensor, the best weights so far, and both as tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from actors.devices.transfer import whole
from actors.training.division import as_divided, own_rows
from planners.recovery import BETAS, EPSILON, Recovery

WEIGHT, BEST = "weight/", "best/"  # before the name of a tensor
# Likewise -> torch's name. A tensor has taken fewer steps where its layer was replaced in some.
MOMENTS = {"exp_avg/": "exp_avg", "exp_avg_sq/": "exp_avg_sq", "taken/": "step"}


class Steps:
    """What is trained, with the moments of its gradients and a copy of the best values.

    The change of a tensor in a step is ``rate * unit`` at most, so one rate suits tensors of all
    sizes; weight decay is by the rate alone.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        units: Mapping[str, float],
        recovery: Recovery,
        *,
        divided: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Begin with the present values as the best.

        Args:
            parameters: name -> tensor.
            units: name -> what its rate is multiplied by.
            recovery: weight decay and clipping.
            divided: name -> tensor that is divided over workers; its parameter is the own rows.
        """
        self._parameters, self._units, self._recovery = dict(parameters), units, recovery
        self._divided = divided or {}
        self._best = {name: each.detach().clone() for name, each in parameters.items()}
        self._adam = self._new_adam()

    def step(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        """Change the tensors, given their gradients in the order of their names.

        A tensor without a gradient keeps its value and its moments.
        """
        self._clip(dict(zip(self._parameters, gradients, strict=True)))
        for parameter, gradient in zip(self._parameters.values(), gradients, strict=True):
            parameter.grad = gradient
        for group in self._adam.param_groups:
            group["lr"] = rate * group["unit"]
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def keep(self) -> None:
        """Take the present values as the best."""
        for name, parameter in self._parameters.items():
            self._best[name].copy_(parameter.detach())

    def return_to_best(self) -> None:
        """Take the best values, and forget the gradients so far."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._best[name])
        self._adam = self._new_adam()

    def tensors(self) -> dict[str, Tensor]:
        """Return all of it, not copied, for `restore`."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            state = self._adam.state.get(parameter, {})
            own = {WEIGHT: parameter.detach(), BEST: self._best[name]}
            own |= {key: state[kind] for key, kind in MOMENTS.items() if kind in state}
            found |= {key + name: self._as_divided(name, each) for key, each in own.items()}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on bit for bit from what `tensors` returned."""
        self._adam = self._new_adam()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._own(name, tensors[WEIGHT + name]))
                self._best[name].copy_(self._own(name, tensors[BEST + name]))
                kept = {kind: self._own(name, tensors[key + name]) for key, kind in MOMENTS.items()
                        if key + name in tensors}  # fmt: skip
                if kept:
                    moments = {kind: each.to(parameter.device) for kind, each in kept.items()}
                    self._adam.state[parameter] = {**moments, "step": kept["step"]}

    def _as_divided(self, name: str, own: Tensor) -> Tensor:
        """Return a tensor of the rows of all workers; a count of steps is the same for all."""
        like = self._divided.get(name)
        return own if like is None or own.ndim == 0 else as_divided(own, like)

    def _own(self, name: str, value: Tensor) -> Tensor:
        like = self._divided.get(name)
        return value if like is None or value.ndim == 0 else own_rows(value, like)

    def _new_adam(self) -> torch.optim.AdamW:
        groups = [
            {"params": [each], "unit": self._units[name],
             "weight_decay": self._recovery.weight_decay / self._units[name]}
            for name, each in self._parameters.items()
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    def _clip(self, gradients: Mapping[str, Tensor | None]) -> None:
        limit = self._recovery.clip
        if not limit:
            return
        found = {name: each for name, each in gradients.items() if each is not None}
        # Of whole tensors, one at a time: sums over rows would depend on who has which.
        all_ = (whole(self._as_divided(name, each)) for name, each in found.items())
        squares = [each.to(torch.float64).square().sum() for each in all_]
        norm = float(torch.stack(squares).sum().sqrt())
        if norm > limit:
            for each in found.values():
                each.mul_(limit / norm)
