"""Several methods in one recipe: which can be combined, and what a step leaves for the next."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planners.budget.schemes import SCHEMES
from planners.errors import ConfigError
from planners.method import MethodSpec, Option
from planners.model.form import ModelForm
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape

Step = tuple[MethodSpec, Mapping[str, Option]]


def require_disjoint(steps: Sequence[Step]) -> None:
    """Check that no two steps shrink the same linear, and that nothing follows quantisation.

    A method that shares tensors among layers goes with no other.

    Raises:
        ConfigError: two do; the message names both.
    """
    sharing = [index for index, (spec, _) in enumerate(steps) if spec.shares]
    if sharing and len(steps) > 1:
        index = sharing[0]
        raise ConfigError(
            f"steps[{index}]: {steps[index][0].name} shares tensors among layers, and nothing can "
            "cut or round them before or behind it",
            hint="use it alone, without other steps",
        )
    for index, (spec, options) in enumerate(steps[:-1]):
        if spec.quantises or SCHEMES.name in options:
            raise ConfigError(
                f"steps[{index}]: {spec.name} quantises, and nothing can cut or round what is "
                f"quantised, as steps[{index + 1}], {steps[index + 1][0].name}, would",
                hint="make it the last step",
            )
    steps = [step for step in steps if not step[0].quantises]
    for later, (spec, options) in enumerate(steps):
        for earlier, (other, others) in enumerate(steps[:later]):
            shared = _parts(spec, options) & _parts(other, others)
            if shared:
                raise ConfigError(
                    f"steps[{later}]: {spec.name} shrinks {_modules(spec, options)}, and steps"
                    f"[{earlier}], {other.name}, shrinks {_modules(other, others)}: both change "
                    f"{', '.join(sorted(shared))}",
                    hint="give each step different modules, such as modules=mlp,vo",
                )


def is_identity(start: ModelForm, form: ModelForm, spec: MethodSpec) -> bool:
    """Return whether a step with this form removes nothing, so that its output is its input.

    False for methods that can change values without changing widths.
    """
    return spec.only_shrinks and replace(form, native=start.native) == start


def carries_cut(spec: MethodSpec, following: MethodSpec) -> bool:
    """Return whether a step takes the Gram matrices of the step before, carried behind its cut.

    Behind a cut of an MLP, of q and k or of v and o the inputs of the layer's linears are maps of
    those before, so this is exact for the cut itself. That the layers before it leave other inputs
    is left out: a quantiser does as well with the inputs of the model before.
    """
    return following.quantises and not spec.residual


def is_pure_rotation(shape: ModelShape, form: ModelForm, spec: MethodSpec) -> bool:
    """Return whether a step rotates the residual stream and keeps every axis of it.

    With norms other than plain RMS norms the step also centres the stream or moves biases.
    """
    widths = {
        width
        for layer in form.layers
        for width in (layer.residual_in, layer.residual_mid, layer.residual_out)
    }
    plain = all(
        norm.kind == "rms" and norm.scale and not norm.plus_one
        for kind in shape.kinds
        for norm in kind.norms
    )
    return spec.residual and plain and widths == {shape.hidden}


def _parts(spec: MethodSpec, options: Mapping[str, Option]) -> set[str]:
    return {p for module in spec.shrinks(options) for p in LINEARS_OF.get(module, (module,))}


def _modules(spec: MethodSpec, options: Mapping[str, Option]) -> str:
    return ", ".join(spec.shrinks(options))
