"""One layer whose modules are shrunk by several methods, each those that it was chosen for."""

from collections.abc import Mapping

from torch import Tensor

from actors import methods
from actors.messages import CompressionJob
from planners.model.form import LayerForm
from planners.model.modules import of_modules


def compress(
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    job: CompressionJob,
    index: int,
    start: LayerForm,
    form: LayerForm,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors of one layer, and what each method says of its parts.

    Every method reads the dense weights of its own modules and the dense statistics, as it does
    where it is alone; so their order is of no consequence.

    Args:
        weights: role -> tensor of the layer.
        sums: statistic name -> sum.
        job: its makers say which method shrinks which module.
        index: of the layer.
        start: widths of the layer before.
        form: those to reach.

    Raises:
        NumericsError: statistics gave no usable numbers.
    """
    makers, new = job.makers[index], dict(weights)
    said: dict[str, dict[str, object]] = {"errors": {}, "rungs": {}}
    done: set[str] = set()
    for name, options in {job.method: job.options, **job.candidates}.items():
        own = {module for module, maker in makers.items() if maker == name}
        if not own:
            continue
        done |= own
        new, values = methods.load(name).compress(
            new, sums, shape=job.shape, form=of_modules(start, form, done), options=options
        )
        for key, found in said.items():
            found.update(values[key])
    return new, {**said, "makers": dict(makers)}
