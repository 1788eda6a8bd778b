"""Progressive module replacement: in some steps layers of the teacher stand among the student's.

After BERT-of-Theseus (arXiv:2002.02925) and DeltaLLM (arXiv:2501.18596). Gradients pass through the
teacher's layers, which learn nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from actors.training.whole_model import WholeModel
from planners.recovery import Place, Recovery


class Replacement:
    """Two models whose layers read and write the same residual stream, and who stands when."""

    def __init__(
        self,
        student: WholeModel,
        teacher: WholeModel,
        changed: Sequence[str],
        recovery: Recovery,
        *,
        shared: Mapping[str, str],
    ) -> None:
        """Name the layers that the cut changed, by the prefixes of their tensors.

        ``shared``: the name of a tensor that a layer takes from another -> that it is stored by.
        """
        self._recovery = recovery
        self._names: dict[str, list[str]] = {}  # of a stored tensor, in other layers
        for name, stored in shared.items():
            self._names.setdefault(stored, []).append(name)
        pairs = zip(student.layers.items(), teacher.layers.values(), strict=True)
        self._pairs: dict[int, tuple[str, Any, nn.Module]] = {
            index: (prefix, own, other)
            for index, ((prefix, own), other) in enumerate(pairs)
            if prefix in changed
        }
        # Positions and masks of the last pass of the teacher, which is that of the same tokens: the
        # student's own may be those of narrower heads, or in another dtype.
        self._given: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        for _, _, other in self._pairs.values():
            other.register_forward_pre_hook(self._note, with_kwargs=True)

    @contextmanager
    def standing(self, place: Place) -> Iterator[Callable[[str], bool]]:
        """Put layers of the teacher in their place for a step.

        Yields:
            Whether a tensor takes no part: all layers that use it are replaced.
        """
        left = self._recovery.compressed_layers(place, list(self._pairs))
        out = [pair for index, pair in self._pairs.items() if index not in left]
        for _, own, other in out:
            own.forward = partial(self._instead, other)
        try:
            absent = tuple(prefix for prefix, _, _ in out)
            yield lambda name: all(n.startswith(absent) for n in [name, *self._names.get(name, [])])
        finally:
            for _, own, _ in out:
                del own.forward

    def _note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given[layer] = args[1:], kwargs

    def _instead(self, layer: nn.Module, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return what a layer of the teacher makes of the student's stream, in its own dtype."""
        args, kwargs = self._given[layer]
        dtype = next(layer.parameters()).dtype
        output: Tensor = layer.forward(hidden.to(dtype), *args, **kwargs)
        return output.to(hidden.dtype)
