"""Several methods for the same modules: the option that names them, and what they are as one.

The method that a run names is asked how its budget is shared out and on what damage is measured;
the others join it with their own cuts of its modules. What comes of it has the form of a method's
spec, so that whoever plans with one needs not know that there are several.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from planners.budget.hull import Ladders, cheapest, read_curves, require_levels
from planners.errors import ConfigError
from planners.method import Allocation, Candidate, MethodSpec, Option, OptionSpec, Target
from planners.model.form import LayerForm, ModelForm, Start
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

NAME = "candidates"
# An option without a default is there only where it is given: then one method alone is what it was.
OPTION = OptionSpec(
    name=NAME,
    default="",
    help="with allocation=marginal: methods that compete for each module of each layer, this one "
    "and others, such as modegpt,svdllm",
)
MEASURING = ("grid", "damage", "probe_tokens")  # options that all who compete share


def shares(options: Mapping[str, Option]) -> list[float]:
    """Return the kept fractions at which damage is measured.

    Raises:
        ValueError: they are no numbers.
    """
    return [float(share) for share in str(options["grid"]).split(",")]


def others(name: str, options: Mapping[str, Option]) -> list[str]:
    """Return the methods beside one that are to compete with it, each once, sorted."""
    named = {each.strip() for each in str(options.get(NAME, "")).split(",")}
    return sorted(named - {"", name})


def combined_spec(
    spec: MethodSpec, options: Mapping[str, Option], joining: Sequence[MethodSpec]
) -> MethodSpec:
    """Return a method together with others that compete for its modules.

    Raises:
        ConfigError: they cannot compete; the message says why.
    """
    names = ", ".join(each.name for each in joining)
    if spec.measures(options) != "damage":
        raise ConfigError(
            f"options.{NAME}: {names} cannot compete with {spec.name} where no damage is measured",
            hint="use allocation=marginal, and servable=remote",
        )
    own = replace(spec, candidates=())
    candidates = [Candidate(spec=own, options=options)]
    candidates += [_joined(spec, options, each) for each in joining]
    for_widths = {**options, "allocation": "uniform"}  # until the damage is known

    def statistics(options: Mapping[str, Option]) -> frozenset[Statistic]:
        found = own.statistics(options)
        return found.union(*(each.spec.statistics(each.options) for each in candidates[1:]))

    def refuses(shape: ModelShape, options: Mapping[str, Option]) -> str:
        reasons = [own.refuses(shape, options)]
        reasons += [each.spec.refuses(shape, each.options) for each in candidates[1:]]
        return next((reason for reason in reasons if reason), "")

    def form(
        shape: ModelShape, start: Start, target: Target, options: Mapping[str, Option]
    ) -> ModelForm:
        del options
        fraction = target.keep_fraction or 1.0
        ladders = ladders_of(candidates, shape, start)
        require_levels(shape, ladders, keep_fraction=fraction, start=start)
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
            shape,
            curves,
            ladders_of(candidates, shape, start),
            keep_fraction=target.keep_fraction or 1.0,
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
    """Return for each layer how each method shrinks each of its modules; layers alike share it."""
    known: list[tuple[LayerForm, Ladders]] = []
    found = []
    for layer in start.form.layers:
        ladders = next((ladders for other, ladders in known if other == layer), None)
        if ladders is None:
            ladders = {
                each.spec.name: each.spec.ladders(shape, layer, each.options) for each in candidates
            }
            known.append((layer, ladders))
        found.append(ladders)
    return found


def _joined(spec: MethodSpec, options: Mapping[str, Option], other: MethodSpec) -> Candidate:
    modules = spec.shrinks(options)
    if other.joins is None:
        why = "turns the residual stream" if other.residual else "shrinks no module alone"
        raise ConfigError(
            f"options.{NAME}: {other.name} {why}, and cannot compete with {spec.name} for "
            f"{', '.join(modules)}",
            hint="make it a step of its own",
        )
    joined = other.joins(modules)
    if not joined:
        raise ConfigError(f"options.{NAME}: {other.name} shrinks none of {', '.join(modules)}")
    shared = {name: options[name] for name in MEASURING}
    return Candidate(spec=other, options={**joined, **shared})


def _by_method(own: str, finding: Mapping[str, object]) -> dict[str, object]:
    """Return method -> curves: the own ones stand where they stand without others."""
    rest = finding[NAME]
    assert isinstance(rest, Mapping)  # put together by the driver
    return {own: finding["curves"], **rest}
