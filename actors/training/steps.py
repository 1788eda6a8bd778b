"""Steps of AdamW with a rate for each tensor, the best weights so far, and both as tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

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
    ) -> None:
        """Begin with the present values as the best.

        Args:
            parameters: name -> tensor.
            units: name -> what its rate is multiplied by.
            recovery: weight decay and clipping.
        """
        self._parameters, self._units, self._recovery = dict(parameters), units, recovery
        self._best = {name: each.detach().clone() for name, each in parameters.items()}
        self._adam = self._new_adam()

    def step(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        """Change the tensors, given their gradients in the order of their names.

        A tensor without a gradient keeps its value and its moments.
        """
        self._clip([gradient for gradient in gradients if gradient is not None])
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
        found = {WEIGHT + name: each.detach() for name, each in self._parameters.items()}
        found |= {BEST + name: each for name, each in self._best.items()}
        for name, parameter in self._parameters.items():
            state = self._adam.state.get(parameter, {})
            found |= {key + name: state[kind] for key, kind in MOMENTS.items() if kind in state}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on bit for bit from what `tensors` returned."""
        self._adam = self._new_adam()
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[WEIGHT + name])
                self._best[name].copy_(tensors[BEST + name])
                kept = {kind: tensors[key + name] for key, kind in MOMENTS.items()
                        if key + name in tensors}  # fmt: skip
                if kept:
                    moments = {kind: each.to(parameter.device) for kind, each in kept.items()}
                    self._adam.state[parameter] = {**moments, "step": kept["step"]}

    def _new_adam(self) -> torch.optim.AdamW:
        groups = [
            {"params": [each], "unit": self._units[name],
             "weight_decay": self._recovery.weight_decay / self._units[name]}
            for name, each in self._parameters.items()
        ]  # fmt: skip
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)

    def _clip(self, gradients: Sequence[Tensor]) -> None:
        limit = self._recovery.clip
        if not limit:
            return
        squares = [gradient.to(torch.float64).square().sum() for gradient in gradients]
        norm = float(torch.stack(squares).sum().sqrt())
        if norm > limit:
            for gradient in gradients:
                gradient.mul_(limit / norm)
