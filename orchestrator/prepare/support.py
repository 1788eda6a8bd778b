"""What each method can do with each supported model type."""

from collections.abc import Sequence
from typing import Any

from orchestrator.recipe.method_options import resolve_options
from planners.families import example_shape, known_types
from planners.method import MethodSpec


def supported(specs: Sequence[MethodSpec]) -> list[dict[str, Any]]:
    """Return one row a model type, with its family and what each method does by default.

    That is the modules that it compresses, those that it leaves, with the reason, or the reason why
    it does not apply.
    """
    rows = []
    for model_type, family in sorted(known_types().items(), key=lambda each: each[1].name):
        shape = example_shape(model_type)
        methods = {}
        for spec in specs:
            options = resolve_options(spec, {})
            reason, left = spec.refuses(shape, options), dict(spec.leaves(shape, options))
            modules = [m for m in spec.shrinks(options) if not reason and m not in left]
            methods[spec.name] = {"modules": modules, "left": left, "reason": reason}
        rows.append({"model_type": model_type, "family": family.name, "methods": methods})
    return rows
