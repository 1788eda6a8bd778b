"""How many workers it takes to train a whole model: one, or several who divide its layers."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from planners.errors import PlanError
from planners.memory.peaks import LIBRARIES
from planners.memory.training import model_parts
from planners.model.form import ModelForm
from planners.model.shape import ModelShape
from planners.recovery import Recovery

MORE = [2**power for power in range(1, 9)]  # workers that a refusal may name


@dataclass(frozen=True, slots=True)
class Room:
    """The workers there are.

    Attributes:
        dtype: of the products, and of the dense model.
        worker_bytes: memory of each.
        num_workers: how many.
    """

    dtype: str
    worker_bytes: int
    num_workers: int


def trainers(
    shape: ModelShape, form: ModelForm, how: Recovery, room: Room
) -> tuple[dict[str, int], int]:
    """Return the peak of a worker that trains the whole model, by kind, and the fewest workers.

    Args:
        shape: of the model.
        form: its widths.
        how: it is trained.
        room: the workers there are.

    Raises:
        PlanError: it does not fit them.
    """
    tried = _Tried(shape, form, room)
    sizes = [1]
    if _may_divide(form, how):
        most = min(room.num_workers, how.parts)
        sizes = [size for size in range(1, most + 1) if how.parts % size == 0]
    found = tried.first(how, sizes)
    if found:
        return tried.parts(how, found), found
    most = sizes[-1]
    held = f", its layers divided over {most} workers" if most > 1 else ""
    missing = tried.lacking(how, most)
    raise PlanError(
        f"recover: a worker of {room.worker_bytes:,} bytes is {missing:,} bytes too small to train "
        f"the whole model with gradients and moments{held}",
        hint="; or ".join(["use --recover local, which trains one layer at a time",
                           *tried.ways(how, sizes)]),
    )  # fmt: skip


def _may_divide(form: ModelForm, how: Recovery) -> bool:
    """Return whether no layer stands in the place of another or shares with it."""
    return how.replace == "none" and not form.shares


class _Tried:
    def __init__(self, shape: ModelShape, form: ModelForm, room: Room) -> None:
        self._shape, self._form, self._room = shape, form, room

    def parts(self, how: Recovery, workers: int) -> dict[str, int]:
        """Return the peak of each of so many workers."""
        shape, dtype = self._shape, self._room.dtype
        return model_parts(shape, self._form, shape, how, dtype=dtype, workers=workers)

    def lacking(self, how: Recovery, workers: int) -> int:
        """Return the bytes that each of so many workers lacks, below 0 where it has more."""
        return sum(self.parts(how, workers).values()) + LIBRARIES - self._room.worker_bytes

    def first(self, how: Recovery, sizes: Iterable[int]) -> int:
        """Return the first number of workers that hold it; 0 for none."""
        return next((size for size in sizes if self.lacking(how, size) <= 0), 0)

    def ways(self, how: Recovery, sizes: list[int]) -> list[str]:
        """Return what else would fit, other than training single layers."""
        found = []
        if how.trains != "lora" and self.first(replace(how, trains="lora"), sizes):
            found.append("--recover-trains lora")
        if _may_divide(self._form, how):
            more = [size for size in MORE if size > sizes[-1]]
            fits = (size for size in more if self.lacking(_cut(how, size), size) <= 0)
            if size := next(fits, 0):
                found.append(
                    f"divide its layers over more workers: --workers {size}, with recover.parts "
                    f"{size} and a recover.batch of {_cut(how, size).batch}"
                )
        return found


def _cut(how: Recovery, parts: int) -> Recovery:
    """Return a recovery with so many parts of a batch, and as many sequences as they divide."""
    return replace(how, parts=parts, batch=-(-how.batch // parts) * parts)
