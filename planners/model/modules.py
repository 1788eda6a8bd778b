"""The linears and widths of each module of a layer."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from planners.model.form import SOURCE, LayerForm, with_biases
from planners.model.layer import ROLES

# The linears of the modules, and of those that are one linear each.
LINEARS_OF: Mapping[str, tuple[str, ...]] = {
    "qk": ("q_proj", "k_proj"),
    "vo": ("v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    **{name: (name,) for name in ROLES},
}
FIELDS_OF: Mapping[str, tuple[str, ...]] = {
    "qk": ("qk_head_dim",),
    "vo": ("vo_head_dim",),
    "mlp": ("intermediate",),
}


def kept_of(start: LayerForm, form: LayerForm, module: str) -> str:
    """Describe what is left of a module: its width, or the ranks of its linears."""
    changed = [name for name in LINEARS_OF[module] if form.ranks.get(name) != start.ranks.get(name)]
    links = {name: form.links[name] for name in LINEARS_OF[module] if name in form.links}
    if changed or links:
        said = [_shared(form, name) for name in LINEARS_OF[module] if name in {*changed, *links}]
        return "ranks " + ", ".join(said)
    width = FIELDS_OF[module][0]
    return f"width {getattr(form, width)} of {getattr(start, width)}"


def _shared(form: LayerForm, name: str) -> str:
    link = form.links.get(name)
    rows = form.cores.get(name) or 0
    size = f"{form.ranks.get(name, 0)}" + f" x {rows}" * (rows > 0)
    if link is None:
        return f"{name} {size}"
    return f"{name} {size} {'beside' if SOURCE in link.parts else 'with'} layer {link.layer}"


def of_modules(start: LayerForm, form: LayerForm, modules: Collection[str]) -> LayerForm:
    """Return ``start`` with these modules (qk, vo or mlp) as in ``form``."""
    linears = {name for module in modules for name in LINEARS_OF[module]}
    fields: dict[str, Any] = {
        name: getattr(form, name) for module in modules for name in FIELDS_OF[module]
    }
    made_by = {name: form if name in linears else start for name in ROLES}
    ranks, cores, links = (
        {name: getattr(by, key)[name] for name, by in made_by.items() if name in getattr(by, key)}
        for key in ("ranks", "cores", "links")
    )
    schemes = {
        name: scheme
        for source, own in ((start, False), (form, True))
        for name, scheme in source.schemes.items()
        if (name.partition(".")[0] in linears) == own
    }
    biases = {role for role in start.biases if role not in linears}
    biases |= {role for role in form.biases if role in linears}
    fields |= {"ranks": ranks, "cores": cores, "links": links, "schemes": schemes}
    return with_biases(replace(start, **fields), biases)
