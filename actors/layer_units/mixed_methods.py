"""Compress one layer by several methods, each of them the modules that it was chosen for."""

from collections.abc import Mapping

from torch import Tensor

from actors import methods
from actors.messages import CompressionJob
from planners.model.form import LayerForm
from planners.model.modules import of_modules


def compress(  # noqa: PLR0913 a layer, before and after
    weights: Mapping[str, Tensor],
    sums: Mapping[str, Tensor],
    *,
    job: CompressionJob,
    index: int,
    start: LayerForm,
    form: LayerForm,
    carried: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Return the tensors of one layer, and the values of each method for its modules.

    Every method reads the uncompressed weights of its own modules and statistics of the
    uncompressed model, as it does alone; so the order of the methods does not matter.

    Args:
        weights: role -> tensor of the layer.
        sums: statistic name -> sum.
        job: its ``makers`` name the method of each module.
        index: of the layer.
        start: form of the layer in the input model.
        form: of the layer in the result.
        carried: is given the Gram matrices behind cuts.

    Raises:
        NumericsError: statistics gave no usable numbers.
    """
    makers, new = job.makers[index], dict(weights)
    found: dict[str, dict[str, object]] = {"errors": {}, "rungs": {}}
    done: set[str] = set()
    for name, options in {job.method: job.options, **job.candidates}.items():
        own = {module for module, maker in makers.items() if maker == name}
        if not own:
            continue
        done |= own
        new, values = methods.load(name).compress(
            new,
            sums,
            shape=job.shape,
            form=of_modules(start, form, done),
            options=options,
            carried=carried,
        )
        for key, values_of_modules in found.items():
            values_of_modules.update(values[key])
    return new, {**found, "makers": dict(makers)}
