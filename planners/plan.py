"""The words that cross every border: what a model is, what it becomes, who does which part.

Everything here is frozen data that survives JSON both ways, so that a plan can be written, read by
another process, compared and fingerprinted.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 2  # of what a run directory holds: raised when an older one cannot be gone on with

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Option = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The integers of a decoder-only transformer: all that planning needs to know of it.

    Attributes:
        family: file in ``planners/families`` that names its tensors.
        model_type: ``model_type`` of its ``config.json``.
        num_layers: decoder blocks.
        hidden: width of the residual stream.
        intermediate: inner width of the gated MLP.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides ``num_heads``.
        head_dim: width of one head.
        vocab_size: rows of the embedding.
        tied: the head is the embedding's tensor and is stored once.
        qkv_bias: q, k and v have a bias.
        o_bias: the attention output has a bias.
        mlp_bias: gate, up and down have a bias.
        dtype: storage type of the weights, ``float32``, ``bfloat16`` or ``float16``.
    """

    family: str
    model_type: str
    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    dtype: str = "float32"

    @property
    def num_sites(self) -> int:
        """Sites of the residual stream: two a layer and the one the head reads."""
        return 2 * self.num_layers + 1

    def linear_dims(self, name: str) -> tuple[int, int]:
        """Return (out, in) of one of `LINEARS` before compression."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (q, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, q),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[name]

    def has_bias(self, name: str) -> bool:
        """Return whether that linear has a bias in the input model."""
        if name in ("q_proj", "k_proj", "v_proj"):
            return self.qkv_bias
        return self.o_bias if name == "o_proj" else self.mlp_bias


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerForm:
    """The widths of one layer after compression: what the shipped modeling file is built from.

    A layer that nothing touched has the model's own widths, no shortcuts, its norm weights and no
    ranks; see `dense_form`.

    Attributes:
        residual_in: width of the residual stream that enters.
        residual_mid: width between attention and MLP.
        residual_out: width that leaves.
        shortcuts: the residual passes a matrix at each of the two additions (SliceGPT).
        norm_weights: the norms keep their scale; False where it was folded into the next weights.
        intermediate: inner width of the MLP.
        qk_head_dim: width of a query or key head; even, because rope pairs stay whole.
        vo_head_dim: width of a value head.
        o_bias: the attention output has a bias (a v bias may have moved there).
        ranks: linear -> rank, for those stored as two factors.
    """

    residual_in: int
    residual_mid: int
    residual_out: int
    shortcuts: bool = False
    norm_weights: bool = True
    intermediate: int
    qk_head_dim: int
    vo_head_dim: int
    o_bias: bool = False
    v_bias: bool = False
    ranks: Mapping[str, int] = field(default_factory=dict)


def dense_form(shape: ModelShape) -> LayerForm:
    """Return the form of a layer that nothing touched."""
    return LayerForm(
        residual_in=shape.hidden,
        residual_mid=shape.hidden,
        residual_out=shape.hidden,
        intermediate=shape.intermediate,
        qk_head_dim=shape.head_dim,
        vo_head_dim=shape.head_dim,
        o_bias=shape.o_bias,
        v_bias=shape.qkv_bias,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelForm:
    """The widths of the whole compressed model.

    Attributes:
        layers: one form a layer.
        embedding_dim: columns of the embedding that are kept.
        head_dim: width of the residual stream that the head reads.
        head_norm_weight: the final norm keeps its scale.
        tied: the head is still the embedding's tensor.
        native: a stock config of the input's own family expresses it.
    """

    layers: tuple[LayerForm, ...]
    embedding_dim: int
    head_dim: int
    head_norm_weight: bool
    tied: bool
    native: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a step begins with: the model that the steps before it have left.

    Attributes:
        form: widths of the step's input model.
        parameters_before: distinct elements of the model that the run began with, which is what
            every keep_fraction is a fraction of.
    """

    form: ModelForm
    parameters_before: int


@dataclass(frozen=True, slots=True, order=True)
class Statistic:
    """A sum over calibration tokens: what is observed, and what is summed.

    Attributes:
        tap: the point in a layer, e.g. ``resid_attn``.
        kind: ``gram`` (x^T x), ``normed_gram`` (of x / rms(x)), ``head_gram`` (one gram a head),
            ``pair_energy`` (sum of squares of each rope pair of each head), ``cosine``.
    """

    tap: str
    kind: str

    def __str__(self) -> str:
        """Return the name under which it is stored."""
        return f"{self.tap}.{self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSpec:
    """One option of a method: a name, a default, and what else is possible."""

    name: str
    default: Option
    choices: tuple[Option, ...] = ()
    minimum: float | None = None
    help: str = ""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A contiguous run of layers held by one worker.

    Attributes:
        first: first layer.
        last: one past the last layer.
        embedding: this stage looks tokens up.
        head: this stage computes losses.
        bytes: planned peak of its worker by kind: weights, statistics, boundaries, workspace.
    """

    first: int
    last: int
    embedding: bool
    head: bool
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything decided before the first tensor is read.

    Attributes:
        shape: of the model.
        form: of the result.
        waves: the stages that are held at one time by each chain.
        parameters_before: of the input model.
        parameters_after: of the result.
        bytes_before: of the weights of the input model, as stored.
        bytes_after: of those of the result.
        calibration_tokens: all together.
        calibration_flops: of the pass, all workers together.
        worker_bytes: planned peak of the fullest worker.
        disk_bytes: that the run directory takes at its fullest.
        chains: how many times the stages of a wave are held, each with shards of its own.
    """

    shape: ModelShape
    form: ModelForm
    waves: tuple[tuple[StagePlan, ...], ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    calibration_flops: int
    worker_bytes: int
    disk_bytes: int
    chains: int = 1

    @property
    def num_workers(self) -> int:
        """Workers that have something to do in the widest wave."""
        return self.chains * max(map(len, self.waves))

    @property
    def keep_fraction(self) -> float:
        """Parameters after over parameters before, true counts."""
        return self.parameters_after / self.parameters_before


def to_json(value: Any) -> Any:
    """Return ``value`` as plain JSON data; dataclasses become objects, tuples lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    return value


def layer_form_from_json(data: Mapping[str, Any]) -> LayerForm:
    """Return the layer form that `to_json` wrote."""
    return LayerForm(**data)


def model_form_from_json(data: Mapping[str, Any]) -> ModelForm:
    """Return the model form that `to_json` wrote."""
    layers = tuple(layer_form_from_json(layer) for layer in data["layers"])
    return ModelForm(**{**data, "layers": layers})


def run_plan_from_json(data: Mapping[str, Any]) -> RunPlan:
    """Return the plan that `to_json` wrote."""
    waves = tuple(tuple(StagePlan(**stage) for stage in wave) for wave in data["waves"])
    shape = ModelShape(**data["shape"])
    form = model_form_from_json(data["form"])
    return RunPlan(**{**data, "waves": waves, "shape": shape, "form": form})


def fingerprint(value: Any) -> str:
    """Return the sha256 of the canonical JSON of ``value``.

    Raises:
        TypeError: something in ``value`` has no stable JSON form.
    """
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
