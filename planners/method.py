"""What the planners know about a method: options, targets, allocation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from planners.model.form import LayerForm, ModelForm, Start
from planners.model.scheme import Scheme
from planners.model.serving_load import LayerTimes, ServingLoad
from planners.model.shape import ModelShape
from planners.model.taps import Statistic

Option = str | int | float | bool
SIZES = (
    "keep_fraction",
    "slice",
    "fit",
    "speedup",
    "keep_bytes",
    "bits",
)  # keys of a recipe of which one is given


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option of a method: a name, a default, and what else is possible.

    Attributes:
        name: of the option.
        default: used if it is not given; values have its type.
        choices: all allowed values; empty if any value of the type is.
        minimum: smallest allowed number.
        former: its former name, which is still read.
        help: as ``--help`` prints it.
        per_layer: a layer may have a value of its own, because the option affects only the bytes
            of that layer: no widths, statistics or other units.
    """

    name: str
    default: Option
    choices: tuple[Option, ...] = ()
    minimum: float | None = None
    former: str = ""
    help: str = ""
    per_layer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is asked of the result: one of the first six is set, or none where options say it all.

    Attributes:
        keep_fraction: parameters after / before, true counts of the whole model, in (0, 1].
        slice: nominal fraction of the residual width to remove, in [0, 1).
        fit: bytes of weights, of the keys and values of a load, and of workspace.
        keep_bytes: of all tensors of the result, as stored.
        bits: of a weight of the linears of the input model, on average, scales included.
        speedup: time of the input model over that of the result, under a load.
        load: for ``fit`` and ``speedup``.
        workspace: bytes that the input model needs beside weights, keys and values under the load.
        times: for ``speedup``, those of the input model's layers; None until they are measured.
    """

    keep_fraction: float | None = None
    slice: float | None = None
    fit: int | None = None
    speedup: float | None = None
    keep_bytes: int | None = None
    bits: float | None = None
    load: ServingLoad = field(default_factory=ServingLoad)
    workspace: int = 0
    times: LayerTimes | None = None

    @property
    def asked(self) -> dict[str, float]:
        """The size that was asked for, under its name in a recipe."""
        sizes = {name: getattr(self, name) for name in SIZES}
        return {name: size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The sizes to which one method can cut one module of a layer, step by step.

    Attributes:
        sizes: of the cut module, ascending: a width, or the sum of the ranks of its linears. The
            uncut module is among them only if a scheme changes it. Each step costs more.
        whole: the size of the uncut module.
        levels: the sizes at which damage is measured, descending.
        cut: (layer, size) -> the layer with this module at that size, its others unchanged.
        module: that it cuts, where its name says more than that.
        scheme: by which the module is quantised, too.
    """

    sizes: Sequence[int]
    whole: int
    levels: tuple[int, ...]
    cut: Callable[[LayerForm, int], LayerForm]
    module: str = ""
    scheme: Scheme | None = None

    def cuts(self, size: int) -> bool:
        """Return whether a module of that size is another than the uncut one."""
        return self.scheme is not None or size < self.whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The widths of a result, and which method cuts each module to them.

    Attributes:
        form: the widths.
        makers: of each layer, module -> the method that shrinks it, where several methods compete;
            empty for a single method.
        servable: the constraint of `planners.budget.served` that was chosen; empty if none was.
        damages: constraint -> the damage predicted under it, of those that were compared.
        damage: predicted, of all cuts together.
    """

    form: ModelForm
    makers: tuple[Mapping[str, str], ...] = ()
    servable: str = ""
    damages: Mapping[str, float] = field(default_factory=dict)
    damage: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One of several methods that compete for the same modules.

    Attributes:
        spec: of the method.
        options: with which it competes.
    """

    spec: "MethodSpec"
    options: Mapping[str, Option]


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec:
    """What the planners know about a method; its tensor functions are in its file.

    Attributes:
        name: the file's name.
        revision: raised when the same input would give different bytes.
        source: paper, as ``arXiv:NNNN.NNNNN``.
        modules: the modules it can shrink.
        options: everything that can be set, with defaults.
        residual: it rotates the residual stream, so a layer unit needs the bases of its sites.
        cuts_widths: its ladders are widths of modules, whose times can be measured one by one.
        quantises: it changes how matrices are stored, and no width: it may follow any other
            method, and nothing can follow it.
        shares: layers may take tensors from earlier ones, so ``compress`` is given the layers
            with which one shares.
        only_shrinks: every change shows in widths and ranks: a model that keeps all of them keeps
            all values. False for a method that can change values or dtypes alone.
        statistics: (shape, options) -> the sums it needs of every layer.
        refuses: (shape, options) -> why it does not support the model, or an empty string.
        leaves: (shape, options) -> modules of its own that it leaves as they are, and why.
        form: (shape, start, target, options) -> the widths that meet the target without any
            statistics; what the method does not shrink stays as in ``start``.
        cuts: options -> the modules that it shrinks with these options; all of them if empty.
        measures: options -> what must be measured on each layer before widths are final: nothing,
            ``influence``, ``damage`` or ``losses``.
        allocate: (shape, start, target, options, measurements of each layer) -> final widths.
        ladders: (shape, layer, options) -> module (qk, vo or mlp) -> its ladder.
        joins: modules of qk, vo and mlp -> the options with which it competes for these; None if
            it cannot compete.
        candidates: all methods that compete, this one first; empty for a single method.
    """

    name: str
    revision: int
    source: str
    modules: tuple[str, ...]
    options: tuple[OptionSpec, ...]
    residual: bool
    statistics: Callable[[ModelShape, Mapping[str, Option]], frozenset[Statistic]]
    refuses: Callable[[ModelShape, Mapping[str, Option]], str]
    form: Callable[[ModelShape, Start, Target, Mapping[str, Option]], ModelForm]
    leaves: Callable[[ModelShape, Mapping[str, Option]], Mapping[str, str]] = lambda *_: {}
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
    cuts_widths: bool = False
    quantises: bool = False
    shares: bool = False
    only_shrinks: bool = False
    candidates: tuple[Candidate, ...] = ()

    def shrinks(self, options: Mapping[str, Option]) -> tuple[str, ...]:
        """Return the modules that it shrinks with these options."""
        return self.cuts(options) or self.modules
