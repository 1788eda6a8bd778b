"""Several methods that compete for the same modules: the option, and their combined spec.

The method that a run names sets the budget and how damage is measured; the others join it with
their own cuts of its modules. The combination is a `MethodSpec` too, so that planning does not
depend on whether there are several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planners.budget.budgets import budget_of
from planners.budget.hull import Ladders, cheapest, read_curves, require_levels
from planners.budget.schemes import SCHEMES
from planners.budget.steps import MULTIPLE_OF, TENSOR_PARALLEL
from planners.errors import ConfigError
from planners.method import Allocation, Candidate, Ladder, MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.modules import LINEARS_OF
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

NAME = "candidates"
# Without a default the option is present only if given, so a single method's options do not change.
OPTION = OptionSpec(
    name=NAME,
    default="",
    help="with allocation=marginal: methods that compete for each module of each layer, this one "
    "and others, such as modegpt,svdllm",
)
# Options that all candidates share.
MEASURING = ("grid", "damage", "probe_tokens", MULTIPLE_OF.name, TENSOR_PARALLEL.name)


def shares(options: Mapping[str, Option]) -> list[float]:
    """Return the kept fractions at which damage is measured.

    Raises:
        ValueError: one is not a number.
    """
    return [float(share) for share in str(options["grid"]).split(",")]


def others(name: str, options: Mapping[str, Option]) -> list[str]:
    """Return the other methods that compete with ``name``, each once, sorted."""
    named = {each.strip() for each in str(options.get(NAME, "")).split(",")}
    return sorted(named - {"", name})


def combined_spec(
    spec: MethodSpec, options: Mapping[str, Option], joining: Sequence[MethodSpec]
) -> MethodSpec:
    """Return the spec of a method combined with others that compete for its modules.

    Raises:
        ConfigError: they cannot compete; the message says why.
    """
    names = ", ".join(each.name for each in joining)
    if spec.measures(options) != "damage" or options.get("servable") in ("narrow_heads", "vllm"):
        raise ConfigError(
            f"options.{NAME}: {names} cannot compete with {spec.name} unless damage is measured "
            "and widths are free",
            hint="use allocation=marginal, and servable=remote",
        )
    if SCHEMES.name in options:
        raise ConfigError(
            f"options.{NAME}: {names} cannot compete with {spec.name} where bits are chosen, too",
            hint="use --keep-fraction, and a step of gptq behind it; or leave candidates out",
        )
    own = replace(spec, candidates=())
    candidates = [Candidate(spec=own, options=options)]
    candidates += [_joined(spec, options, each) for each in joining]
    for_widths = {**options, "allocation": "uniform"}  # until the damage is known

    def statistics(shape: ModelShape, options: Mapping[str, Option]) -> frozenset[Statistic]:
        found = own.statistics(shape, options)
        return found.union(*(each.spec.statistics(shape, each.options) for each in candidates[1:]))

    def refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
        reasons = [own.refuses(shape, options)]
        reasons += [each.spec.refuses(shape, each.options) for each in candidates[1:]]
        return next((reason for reason in reasons if reason), "")

    def form(
        shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
    ) -> ModelForm:
        del options
        ladders = ladders_of(candidates, shape, start)
        require_levels(ladders, budget=budget_of(shape, start, target), start=start)
        return own.form(shape, start, target, for_widths)

    def allocate(
        shape: ModelShape,
        start: Start,
        target: Target,
        options: Mapping[str, Option],
        findings: list[Mapping[str, object]],
    ) -> Allocation:
        del options
        curves = [
            {name: read_curves(known) for name, known in _by_method(own.name, finding).items()}
            for finding in findings
        ]
        return cheapest(
            curves,
            ladders_of(candidates, shape, start),
            budget=budget_of(shape, start, target),
            start=start,
        )

    return replace(
        own,
        statistics=statistics,
        refuses=refuses,
        form=form,
        allocate=allocate,
        candidates=tuple(candidates),
    )


def ladders_of(candidates: Sequence[Candidate], shape: ModelShape, start: Start) -> list[Ladders]:
    """Return the ladders of each layer, by method and module; equal layers share them."""
    known: list[tuple[LayerForm, Ladders]] = []
    found = []
    for layer in start.form.layers:
        ladders = next((ladders for other, ladders in known if other == layer), None)
        if ladders is None:
            ladders = {
                each.spec.name: _of_modules(each.spec.ladders(shape, layer, each.options))
                for each in candidates
            }
            known.append((layer, ladders))
        found.append(ladders)
    return found


def _of_modules(ladders: Mapping[str, Ladder]) -> dict[str, Ladder]:
    """Return the ladders of modules: a method may have others, of cuts that all layers share."""
    return {module: ladder for module, ladder in ladders.items() if module in LINEARS_OF}


def _joined(spec: MethodSpec, options: Mapping[str, Option], other: MethodSpec) -> Candidate:
    modules = spec.shrinks(options)
    if other.shares:
        raise ConfigError(
            f"options.{NAME}: {other.name} shares tensors among layers, so it cannot compete with "
            f"{spec.name} for modules of one",
            hint="make a run of its own with it, and compare",
        )
    if other.joins is None:
        why = "rotates the residual stream" if other.residual else "cannot shrink a module alone"
        raise ConfigError(
            f"options.{NAME}: {other.name} {why}, so it cannot compete with {spec.name} for "
            f"{', '.join(modules)}",
            hint="apply it in a step of its own",
        )
    joined = other.joins(modules)
    if not joined:
        raise ConfigError(f"options.{NAME}: {other.name} shrinks none of {', '.join(modules)}")
    shared = {name: options[name] for name in MEASURING}
    return Candidate(spec=other, options={**joined, **shared})


def _by_method(own: str, finding: Mapping[str, object]) -> dict[str, object]:
    """Return method -> curves; those of ``own`` are stored as for a single method."""
    rest = finding[NAME]
    assert isinstance(rest, Mapping)  # combined by the driver
    return {own: finding["curves"], **rest}
