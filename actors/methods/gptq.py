"""GPTQ (arXiv:2210.17323): round the weights of each linear to few bits, from statistics alone.

The Gram matrix of the inputs of a linear says what each error of rounding does to its outputs, and
`actors.numerics.rounding` rounds column by column so that they cancel. The Gram matrices are those
of the model before any rounding: measured, rounding layer after layer on the inputs that the layers
before it leave is no better, so all layers are rounded in parallel. Results are in the
``pack-quantized`` format of compressed-tensors, or in its formats of small floats.

It also rounds what other methods have cut, with their widths and bits chosen together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors.numerics.packed import Symmetric, congruence, diagonal
from actors.numerics.packing import parts_of
from actors.numerics.rounding import (
    Factor,
    Rounded,
    factor_of,
    relative_errors,
    round_columns,
    round_to_nearest,
    scale_dtype,
)
from planners.budget.budgets import budget_of
from planners.budget.joint import (
    WHOLE_BITS,
    by_bytes,
    provisional,
    smallest_tables,
    table_choices,
    with_tables,
)
from planners.budget.schemes import (
    SCHEMES,
    TIE,
    fitted,
    quantised,
    schemes_of,
    whole_ladders,
)
from planners.budget.steps import TENSOR_PARALLEL, refuses_division
from planners.errors import PlanError
from planners.method import Allocation, Ladder, MethodSpec, Option, OptionSpec, Target
from planners.model.cost import matrices
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.layer import ROLES
from planners.model.scheme import GRIDS, INT, MXFP4, NVFP4, WHOLE_ROW, Scheme, dividing_group
from planners.model.shape import ModelShape
from planners.model.stored_bytes import EMBEDDING, HEAD
from planners.model.taps import INPUT_OF, Statistic, gram_statistics, of_one_input
from planners.refit import OPTION as REFIT
from planners.serving import divided_groups, no_kernel

NEAREST = "nearest"


def input_gram(name: str, weights: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> Symmetric:
    """Return the Gram matrix of the inputs of a matrix: of a linear, or of the second factor."""
    role, _, part = name.partition(".")
    gram = sums[f"{INPUT_OF[role]}.gram"]
    if part != "second":
        return gram
    return congruence(weights[f"{role}.first.weight"].to(torch.float64), gram)


class GPTQ:
    """The tensor functions of the method; no state."""

    def compress(  # noqa: PLR0913 as of all methods, and a dtype
        self,
        weights: Mapping[str, Tensor],
        sums: Mapping[str, Tensor],
        *,
        shape: ModelShape,
        form: LayerForm,
        options: Mapping[str, Option],
        factored: dict[str, Factor] | None = None,
        carried: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Return the tensors of one layer with the schemes of ``form``, and the errors.

        Args:
            weights: role -> tensor, of the widths of ``form``.
            sums: statistic name -> sum, of these widths too.
            shape: of the model.
            form: schemes to reach.
            options: of the method; of another one that asks for rounding.
            factored: cache of factors by tap, shared between calls.
            carried: unused: inputs stay as they are.
            dtype: of what the result does not quantise; None is that of the weights.

        Raises:
            NumericsError: a Gram matrix is not finite, or not positive semi-definite.
        """
        del shape, carried
        new = dict(weights)
        errors: dict[str, object] = {}
        nearest: dict[str, float] = {}
        rungs: dict[str, str] = {}
        for names in of_one_input(form.schemes):
            gram = input_gram(names[0], weights, sums)
            rows = [(weights[f"{name}.weight"], form.schemes[name]) for name in names]
            found, rung = rounded(
                rows, gram, options, dtype=dtype, where=", ".join(names), factored=factored
            )
            for name, (weight, _), each in zip(names, rows, found, strict=True):
                stored = scale_dtype(dtype or weight.dtype)
                del new[f"{name}.weight"]
                new |= {f"{name}.{part}": t for part, t in parts_of(each, stored).items()}
                errors[name], nearest[name] = relative_errors(weight, each, gram)
                rungs[name] = rung
            del found, each  # before the next matrices are rounded
        return new, {"errors": errors, "nearest": nearest, "rungs": rungs}


def rounded(
    rows: Sequence[tuple[Tensor, Scheme]],
    gram: Symmetric,
    options: Mapping[str, Option],
    *,
    dtype: torch.dtype | None,
    where: str,
    factored: dict[str, Factor] | None = None,
) -> tuple[list[Rounded], str]:
    """Return matrices that read the same inputs on their grids, and the rung of the factor.

    Args:
        rows: matrices with their schemes.
        gram: of their inputs.
        options: of the method.
        dtype: of what is not quantised; None is that of the matrices.
        where: names the matrices in errors, and the factor in the cache.
        factored: cache of factors.

    Raises:
        NumericsError: the Gram matrix is not finite, or not positive semi-definite.
    """
    stored = scale_dtype(dtype or rows[0][0].dtype)
    if options.get("rounding") == NEAREST:
        active = diagonal(gram)
        return [round_to_nearest(w, active, s, stored=stored) for w, s in rows], NEAREST
    known = {} if factored is None else factored
    if where not in known:
        known[where] = factor_of(gram, where=where)
    return round_columns(rows, known[where], stored=stored), known[where].rung


def _scheme(options: Mapping[str, Option]) -> Scheme:
    grid = GRIDS[str(options["format"])]
    return Scheme(
        bits=int(options["bits"]) if grid.name == INT else grid.bits[0],
        group=(int(options["group"]) or WHOLE_ROW) if grid.name == INT else grid.group,
        symmetric=bool(options["symmetric"]),
        grid=grid.name,
    )


def _refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
    grid = str(options["format"])
    if grid != INT and not options["symmetric"]:
        return f"symmetric=false: values of format={grid} have no zero point"
    if not options["symmetric"]:
        return (
            "symmetric=false: compressed-tensors 0.20 does not load the zero points of packed "
            "integers, so no such result could be verified"
        )
    return _not_servable(shape, options) if options["servable"] == "vllm" else ""


def _not_servable(shape: ModelShape, options: Mapping[str, Option]) -> str:
    """Return why vLLM would not take any result of these options; empty if it does."""
    if options[EMBEDDING]:
        return f"{EMBEDDING}={options[EMBEDDING]}: vLLM does not read a quantised embedding"
    if options.get(TIE.name) == "free":
        return "tie=free: vLLM fuses q, k and v, which must have one scheme"
    ranks = int(options[TENSOR_PARALLEL.name])
    for scheme in schemes_of(options) or (_scheme(options),):
        why = no_kernel(scheme) or divided_groups(shape, scheme, ranks)
        if why:
            return f"servable=vllm: {why}"
    return refuses_division(shape, options)


def _statistics(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
    found = gram_statistics(shape)
    if _measures(options):
        found |= {Statistic("resid_attn", f"probe{options['probe_tokens']}")}
    return frozenset(found)


def _measures(options: Mapping[str, Option]) -> str:
    return "damage" if SCHEMES.name in options else ""


def _form(
    shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
) -> ModelForm:
    budget = budget_of(shape, start, target)
    if _measures(options):
        smallest = smallest_tables(shape, start, stock=start.form.native, budget=budget)
        ladders = [_ladders(shape, layer, options) for layer in start.form.layers]
        tied = options[TIE.name] == "fused"
        return provisional(ladders, budget=budget, start=smallest, tied=tied)
    dtype = start.form.dtype or shape.dtype
    if options["format"] in (NVFP4, MXFP4) and dtype != "bfloat16":
        raise PlanError(
            f"format={options['format']}: its weights are decoded in bfloat16, and the rest of "
            f"this result is {dtype}",
            hint="use --dtype bfloat16",
        )
    schemes = _schemes(shape, start.form, options)
    layers = [replace(x, schemes=own) for x, own in zip(start.form.layers, schemes, strict=True)]
    form = replace(start.form, layers=tuple(layers))
    bits = (int(options[EMBEDDING]) or WHOLE_BITS, int(options[HEAD]) or WHOLE_BITS)
    if bits == (WHOLE_BITS, WHOLE_BITS):
        return form
    if form.head_shortcut:
        raise PlanError(
            f"{EMBEDDING}, {HEAD}: cannot be quantised where a matrix leads from the stream to "
            "a tied head",
            hint=f"leave {EMBEDDING} and {HEAD} at 0",
        )
    found = with_tables(shape, form, bits)
    # Transformers' own classes cannot fill an embedding that is quantised.
    return replace(found, native=found.native and EMBEDDING not in found.tables)


def _schemes(
    shape: ModelShape, form: ModelForm, options: Mapping[str, Option]
) -> list[dict[str, Scheme]]:
    """Return the scheme of each matrix of each layer.

    Raises:
        PlanError: the group does not divide a width.
    """
    asked = _scheme(options)
    dims = [matrices(shape, layer) for layer in form.layers]
    smaller = asked.grid == INT and options["uneven"] == "smaller"
    if not smaller and asked.group != WHOLE_ROW:
        _require_even(asked, dims)
    return [
        {name: fitted(asked, width) if smaller else asked for name, (_, width) in own.items()}
        for own in dims
    ]


def _require_even(asked: Scheme, dims: Sequence[Mapping[str, tuple[int, int]]]) -> None:
    """Check that a group divides the rows of every matrix of every layer.

    Raises:
        PlanError: it does not; the hint names the largest that does.
    """
    widths = {(index, name): width
              for index, own in enumerate(dims) for name, (_, width) in own.items()}  # fmt: skip
    uneven = [place for place, width in widths.items() if width % asked.group]
    if not uneven:
        return
    index, name = uneven[0]
    fits = min(dividing_group(asked.group, width) for width in widths.values())
    nearest = f"group={fits}, the largest that divides every width" if fits > 1 else "group=0"
    hint = f"use {nearest}, or uneven=smaller: a smaller group where it is needed"
    if asked.grid != INT:
        hint = f"use format=int with {nearest}; the group of format={asked.grid} is fixed"
    raise PlanError(
        f"layer {index}, {name}: a group of {asked.group} does not divide its rows of "
        f"{widths[index, name]}",
        hint=hint,
    )


def _allocate(
    shape: ModelShape,
    start: Start,
    target: Target,
    options: Mapping[str, Option],
    findings: list[Mapping[str, object]],
) -> Allocation:
    stock = start.form.native
    found = by_bytes(
        shape,
        findings,
        [_ladders(shape, layer, options) for layer in start.form.layers],
        table_choices(start, stock=stock),
        budget=budget_of(shape, start, target),
        start=start,
        tied=str(options[TIE.name]) == "fused",
    )
    return replace(found, form=replace(found.form, native=stock))


def _ladders(
    shape: ModelShape, layer: LayerForm, options: Mapping[str, Option]
) -> dict[str, Ladder]:
    found = quantised(whole_ladders(shape, layer), shape, layer, options)
    return {name: ladder for name, ladder in found.items() if ladder.scheme is not None}


SPEC = MethodSpec(
    name="gptq",
    revision=1,
    source="arXiv:2210.17323",
    modules=ROLES,
    residual=False,
    quantises=True,
    options=(
        OptionSpec(
            name="bits",
            default=4,
            choices=(2, 3, 4, 5, 6, 7, 8),
            help="of a weight, 2 to 8; not used with --keep-bytes or --bits, which choose them",
        ),
        OptionSpec(
            name="group",
            default=128,
            choices=(0, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
            help="weights of a row that share a scale, a power of two; 0: the whole row",
        ),
        OptionSpec(
            name="symmetric",
            default=True,
            choices=(True, False),
            help="false: each group stores a zero point, too; refused, as no loader reads it yet",
        ),
        OptionSpec(
            name="format",
            default="int",
            choices=("int", "nvfp4", "mxfp4", "fp8"),
            help="integers, or small floats, whose bits and groups are fixed: nvfp4 and mxfp4 have "
            "4 bits, fp8 has 8 and a scale a row",
        ),
        OptionSpec(
            name="uneven",
            default="refuse",
            choices=("refuse", "smaller"),
            help="a width that the group does not divide: refuse it, or take the largest power of "
            "two that divides it",
        ),
        OptionSpec(
            name="rounding",
            default="gptq",
            choices=("gptq", "nearest"),
            help="gptq, or to the nearest value, for comparison",
        ),
        OptionSpec(
            name="embedding",
            default=0,
            choices=(0, 4, 8),
            help="bits of the embedding; 0: as it is. Such results need our modelling file",
        ),
        OptionSpec(name="head", default=0, choices=(0, 4, 8), help="bits of the head; 0: as it is"),
        OptionSpec(
            name="probe_tokens",
            default=4096,
            minimum=1,
            help="tokens kept to measure the damage of each scheme; at most 3,072 are used",
        ),
        OptionSpec(
            name="servable",
            default="transformers",
            choices=("transformers", "vllm"),
            help="vllm: refuse schemes that none of its kernels takes",
        ),
        TENSOR_PARALLEL,
        SCHEMES,
        TIE,
        REFIT,
    ),
    statistics=_statistics,
    refuses=_refuses,
    form=_form,
    measures=_measures,
    allocate=_allocate,
    ladders=_ladders,
)
METHOD = GPTQ()
