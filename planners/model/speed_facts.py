"""What decides, apart from its size, how fast a compressed model is."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from planners.model.cost import layer_parameters, model_parameters
from planners.model.form import SOURCE, LayerForm, ModelForm
from planners.model.shape import ModelShape

FAST_STEP = 8  # widths that are no multiple of it keep a GPU's fast kernels from 16-bit products


def speed_facts(shape: ModelShape, form: ModelForm) -> dict[str, Any]:
    """Return facts of a model as plain values, which a report keeps.

    ``heads`` has the widths of q/k and v/o of every layer, ``uneven`` what is no multiple of
    `FAST_STEP` with the layers that have it, ``low_rank`` the number of linears that are two
    factors, ``shortcuts`` the number of layers that multiply the residual stream by matrices,
    ``changed`` the number of linears that are changes of another layer's.
    """
    uneven: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, layer in enumerate(form.layers):
        for what, width in dict.fromkeys(_widths(layer)):
            if width % FAST_STEP:
                uneven[what, width].append(index)
    return {
        "dtype": shape.dtype,
        "parameters": model_parameters(shape, form),
        "layer_parameters": sum(layer_parameters(shape, layer) for layer in form.layers),
        "heads": [[layer.qk_head_dim, layer.vo_head_dim] for layer in form.layers],
        "uneven": [
            {"what": what, "width": width, "layers": layers}
            for (what, width), layers in uneven.items()
        ],
        "low_rank": sum(len(layer.ranks.keys() | layer.links.keys()) for layer in form.layers),
        "shortcuts": sum(layer.shortcuts for layer in form.layers),
        "changed": sum(
            SOURCE in link.parts for layer in form.layers for link in layer.links.values()
        ),
    }


def _widths(layer: LayerForm) -> Iterator[tuple[str, int]]:
    for width in (layer.residual_in, layer.residual_mid, layer.residual_out):
        yield "residual", width
    yield "FFN", layer.intermediate
    yield "q/k head", layer.qk_head_dim
    yield "v/o head", layer.vo_head_dim
    for rank in layer.ranks.values():
        yield "rank", rank
