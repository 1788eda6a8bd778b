"""What the report says of the bytes of a result: by kind, bits of a weight, each matrix."""

from collections.abc import Mapping
from typing import Any

from orchestrator.phases.context import RunContext
from planners.model.cost import dense_model_form, matrices
from planners.model.stored_bytes import (
    bits_a_weight,
    bits_of_linears,
    bytes_by_kind,
    linear_weights_of,
    unquantised,
)


def storage(context: RunContext) -> dict[str, Any]:
    """Return the bytes of all tensors before and after, and how matrices are quantised."""
    origin, shape, form = (
        context.prepared.origin.plan.shape,
        context.prepared.plan.shape,
        context.form,
    )
    dense = dense_model_form(origin)
    before, after = bytes_by_kind(origin, dense), bytes_by_kind(shape, form)
    return {
        "before": sum(before.values()),
        "after": sum(after.values()),
        "kinds": [{"kind": kind, "before": before[kind], "after": after[kind]} for kind in before],
        "bits": {
            "before": bits_a_weight(origin, dense),
            "after": bits_a_weight(shape, form),
            "of_input": bits_of_linears(shape, form) / linear_weights_of(origin, dense),
        },
        "dtype": {"before": origin.dtype, "after": form.dtype or shape.dtype},
        "quantised": form.is_quantised,
        "tables": {
            name: {"scheme": str(scheme), "bits": scheme.bits}
            for name, scheme in form.tables.items()
        },
        "unquantised": unquantised(shape, form) if form.is_quantised else [],
    }


def layer_matrices(
    context: RunContext, index: int, values: Mapping[str, object]
) -> list[dict[str, Any]]:
    """Return the matrices of a layer of a quantised result; empty if none is quantised.

    Args:
        context: of the run.
        index: of the layer.
        values: of its record.
    """
    form = context.form.layers[index]
    if not context.form.is_quantised:
        return []
    found = values.get("rounding", {})
    assert isinstance(found, Mapping)  # written by our own units
    errors, nearest, rungs = (found.get(key, {}) for key in ("errors", "nearest", "rungs"))
    rows = []
    for name, (height, width) in matrices(context.prepared.plan.shape, form).items():
        scheme = form.schemes.get(name)
        row = {"name": name, "rows": height, "width": width}
        if scheme is not None:
            row |= {
                "scheme": str(scheme),
                "bits": scheme.bits,
                "error": errors.get(name),
                "nearest": nearest.get(name),
                "factor": rungs.get(name),
            }
        rows.append(row)
    return rows
