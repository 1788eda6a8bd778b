"""Plan several methods in turn: each step on the model that the steps before it will produce."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from orchestrator.prepare.model_config import result_config
from orchestrator.recipe.config import RunConfig
from planners.errors import PlanError
from planners.families import family_of
from planners.families import load as load_family
from planners.method import Target
from planners.model.cost import dense_model_form, dense_start
from planners.model.form import ModelForm, Start
from planners.model.shape import ModelShape
from planners.plan import RunPlan
from planners.planning import Workload, make_plan
from planners.steps import Step, carries_cut, is_identity, is_pure_rotation

if TYPE_CHECKING:
    from orchestrator.prepare.prepared import Prepared


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """The model that a step starts from.

    Attributes:
        config: its ``config.json``.
        shape: integers of the model that the forms refer to: the input of the run, or a narrower
            stock model that an earlier step produced.
        start: its widths, and the parameter count that budgets are fractions of.
    """

    config: Mapping[str, Any]
    shape: ModelShape
    start: Start

    def after(self, form: ModelForm) -> "StepInput":
        """Return the input of the step after one with this form."""
        config = result_config(self.config, self.shape, form)
        if not form.native or form.is_quantised:  # nothing starts from a quantised model
            return replace(self, config=config, start=replace(self.start, form=form))
        shape = family_of(self.shape.model_type).shape_of(config, self.shape.dtype)
        own = replace(dense_model_form(shape), dtype=form.dtype)
        start = replace(self.start, form=own)
        return StepInput(config=config, shape=shape, start=start)


def started(shape: ModelShape, dtype: str) -> Start:
    """Return the start of the first step of a run; ``dtype`` is that of a recipe."""
    start = dense_start(shape)
    if dtype in ("auto", shape.dtype):
        return start
    return replace(start, form=replace(start.form, dtype=dtype))


def planned(
    step: Step,
    target: Target,
    source: StepInput,
    work: Workload,
    *,
    path: str,
    others: Sequence[Step] = (),
) -> RunPlan:
    """Return the plan of a step; ``path`` is its place in the recipe, for errors.

    ``others`` are methods to suggest if they would fit and this one does not.

    Raises:
        PlanError: see `planners.planning.make_plan`.
    """
    try:
        return make_plan(
            source.shape, *step, target=target, work=work, start=source.start, others=others
        )
    except PlanError as error:
        if not path:
            raise
        hint = error.hint.replace("--option ", f"{path}.options.")
        raise PlanError(f"{path}: {error}", hint=hint) from error


def chained(first: "Prepared", steps: Sequence[Step], checkpoint: Checkpoint) -> "Prepared":
    """Return the last step of a recipe, linked to the steps before it.

    Args:
        first: the first step, its plan included.
        steps: method and options of each.
        checkpoint: the input model of the run.

    Raises:
        PlanError: a step does not support the output of those before it; the message has its path.
    """
    config = first.config
    if len(steps) == 1:
        return first
    source = StepInput(config=first.model_config, shape=first.plan.shape, start=first.start)
    found: list[Prepared] = []
    for index, step in enumerate(steps):
        target = config.targets[index]
        # The result of the last step is what is trained.
        own = first.recovery if index == len(steps) - 1 else None
        work = replace(first.work, recovery=own)
        found.append(
            replace(
                first,
                config=step_config(config, index),
                model_config=source.config,
                spec=step[0],
                options=step[1],
                plan=planned(step, target, source, work, path=f"steps[{index}]"),
                work=work,
                recovery=own,
                start=source.start,
                former=tuple(found),
                statistics_uri=first.statistics_uri if index == 0 else "",
            )
        )
        if index < len(steps) - 1:
            source = source.after(found[-1].plan.form)
    shared = _with_shared_sums(found, checkpoint)
    return replace(shared[-1], former=tuple(shared[:-1]))


def step_config(config: RunConfig, index: int) -> RunConfig:
    """Return the recipe of one step; that of the last is the run's own, in the run directory."""
    step = config.chain[index]
    own: dict[str, Any] = {
        "method": step.method,
        "options": dict(step.options),
        "keep_fraction": step.keep_fraction,
        "slice": step.slice,
    }
    if index < len(config.chain) - 1:
        out = Directory(config.out).below(f"steps/{index + 1}-{step.method}")
        own |= {"steps": [], "out": out, "stats": config.stats if index == 0 else ""}
    return config.model_copy(update=own)


def _with_shared_sums(steps: "Sequence[Prepared]", checkpoint: Checkpoint) -> "list[Prepared]":
    """Return the steps, each also summing the statistics that the next can carry over from it."""
    found = [steps[-1]]
    for step in reversed(steps[:-1]):
        if _carries(step, found[0], checkpoint):
            more = step.extra_statistics | found[0].statistics
            work = replace(step.work, extra_statistics=more)
            source = StepInput(config=step.model_config, shape=step.plan.shape, start=step.start)
            target = step.config.target
            plan = planned((step.spec, step.options), target, source, work, path="")
            step = replace(step, extra_statistics=more, work=work, plan=plan, carries=True)
        found.insert(0, step)
    return found


def _carries(step: "Prepared", following: "Prepared", checkpoint: Checkpoint) -> bool:
    """Return whether the statistics after a step are sure to follow from its own."""
    form, spec = step.plan.form, step.spec
    if carries_cut(spec, following.spec):
        return True
    if spec.measures(step.options):
        return False  # its widths are not final yet
    if is_identity(step.start.form, form, spec):
        return True
    if not is_pure_rotation(step.plan.shape, form, spec):
        return False
    # After a rotation the norms have no scale: the inputs of the blocks are divided by it.
    family = load_family(step.plan.shape.family)
    names = [
        f"{family.layer.format(i=layer)}.{norm}.weight"
        for layer in range(step.plan.shape.num_layers)
        for norm in family.norms.values()
    ]
    return all(bool((checkpoint.read(name) != 0).all()) for name in names)
