"""What planners know of a method: options, targets, allocation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from planners.model.form import LayerForm, ModelForm, Start
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

Option = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option of a method: a name, a default, and what else is possible.

    Attributes:
        name: of the option.
        default: where it is not given; values have its type.
        choices: all possible values; empty where any of the type is.
        minimum: smallest possible number.
        help: as ``--help`` prints it.
        per_layer: one layer may have another value than the others: it decides nothing but the
            bytes of that layer, no widths, statistics or other units.
    """

    name: str
    default: Option
    choices: tuple[Option, ...] = ()
    minimum: float | None = None
    help: str = ""
    per_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """How small: one of the two is set.

    Attributes:
        keep_fraction: true parameters kept over parameters before, whole model, in (0, 1].
        slice: nominal fraction of the residual width to remove, in [0, 1).
    """

    keep_fraction: float | None = None
    slice: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """How one method shrinks one module of a layer, from one step to the next.

    Attributes:
        sizes: what it can keep of the module, ascending: a width, or the sum of the ranks of its
            linears. The whole module is not among them. More parameters stay with every step.
        whole: the size of the whole module.
        levels: those at which damage is measured, descending.
        cut: (layer, size) -> the layer with this module of that size, its others as they are.
    """

    sizes: range
    whole: int
    levels: tuple[int, ...]
    cut: Callable[[LayerForm, int], LayerForm]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The widths of a result, and who is to reach them.

    Attributes:
        form: the widths.
        makers: of each layer, module -> the method that shrinks it, where several methods compete;
            empty where one method does all.
    """

    form: ModelForm
    makers: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of several methods that compete for the same modules.

    Attributes:
        spec: of the method.
        options: with which it takes part.
    """

    spec: "MethodSpec"
    options: Mapping[str, Option]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """What the planners may know of a method; its tensor functions stay in its file.

    Attributes:
        name: the file's name.
        revision: raised when the same input would give other bytes.
        source: paper, as ``arXiv:NNNN.NNNNN``.
        modules: what it shrinks.
        options: everything that can be set, with defaults.
        residual: it turns the basis of the residual stream: a layer needs its sites' bases.
        only_shrinks: what it does shows in widths and ranks; a model that keeps all of them keeps
            every number. A method that changes numbers or their dtype alone must not say so.
        statistics: options -> the sums it needs of every layer.
        refuses: why it cannot take this model with these options, or an empty string.
        form: (shape, start, target, options) -> the widths that meet the target without any
            statistics; what the method does not shrink stays as it is in the start.
        cuts: options -> the modules that it shrinks with these options; all of them if empty.
        measures: options -> what must be found out of each layer before widths are final: nothing,
            ``influence``, ``damage`` or ``losses``.
        allocate: (shape, start, target, options, findings of each layer) -> the final widths.
        ladders: (shape, layer, options) -> qk, vo or mlp -> how it shrinks that module alone.
        joins: modules of qk, vo and mlp -> its options where it competes for these; None where it
            cannot.
        candidates: all methods that compete, this one first; none where it is alone.
    """

    name: str
    revision: int
    source: str
    modules: tuple[str, ...]
    options: tuple[OptionSpec, ...]
    residual: bool
    statistics: Callable[[Mapping[str, Option]], frozenset[Statistic]]
    refuses: Callable[[ModelShape, Mapping[str, Option]], str]
    form: Callable[[ModelShape, Start, Target, Mapping[str, Option]], ModelForm]
    measures: Callable[[Mapping[str, Option]], str] = lambda _: ""
    cuts: Callable[[Mapping[str, Option]], tuple[str, ...]] = lambda _: ()
    allocate: (
        Callable[
            [ModelShape, Start, Target, Mapping[str, Option], list[Mapping[str, object]]],
            Allocation,
        ]
        | None
    ) = None
    ladders: Callable[[ModelShape, LayerForm, Mapping[str, Option]], Mapping[str, Ladder]] = (
        lambda *_: {}
    )
    joins: Callable[[Sequence[str]], Mapping[str, Option]] | None = None
    only_shrinks: bool = False
    candidates: tuple[Candidate, ...] = ()

    def shrinks(self, options: Mapping[str, Option]) -> tuple[str, ...]:
        """Return the modules that take part with these options."""
        return self.cuts(options) or self.modules
