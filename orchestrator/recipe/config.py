"""The recipe: what the user typed, as frozen data, and how open values are filled."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from planners.budget.schemes import QUANTISER
from planners.errors import ConfigError
from planners.method import SIZES, Option, Target
from planners.model.serving_load import ServingLoad

DEFAULT_METHOD = "modegpt"
SLICED_METHOD = "slicegpt"  # the one whose paper says sizes as slices
DEFAULT_KEEP_FRACTION = 0.8
DEFAULT_SEQUENCE_LENGTH = 2048
SOURCES_WITH_SPLITS = ("embedded", "stdlib", "wikitext2")
MAX_COUNT = 2**20
_OPEN = (None, "", "auto")  # values that `resolved` and `with_tokens` replace by what is used


class _Section(BaseModel):
    """A part of the recipe. A field's description ends the sentence "it must be"."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Flag:
    """The option of the command line that sets a key of the recipe.

    Attributes:
        option: with what stands for its value, as ``--workers N``.
        help: what it does; at the end, in brackets, what is used where it is not given, unless that
            is simply the key's default.
    """

    option: str
    help: str


SOURCES = (
    "stdlib, wikitext2, embedded, FILE.txt, .jsonl (either also .gz, .zst) or .parquet, "
    "or tokens:FILE.safetensors."
)


class CalibrationConfig(_Section):
    """What the statistics are summed over.

    Attributes:
        bos: each sequence cut from text begins with the tokenizer's BOS, if it has one.
        save_microbatches: ``by cost`` is where it is worth it: saving takes at most 5 % of the
            time, and work of less than a minute is not saved.
        shards: part of what determines the bytes.
    """

    source: Annotated[
        str, Flag("--calibration SRC", f"{SOURCES} [embedded for tiny, else stdlib]")
    ] = Field(
        default="",
        description="stdlib, wikitext2, embedded, a .txt, .jsonl or .parquet file, "
        "or tokens:FILE.safetensors",
    )
    sequences: Annotated[
        int | None,
        Flag(
            "--calibration-sequences N", "Number of sequences. [all of a token file, 128 of text]"
        ),
    ] = Field(default=None, ge=1, description="a whole number from 1")
    sequence_length: Annotated[
        int | None,
        Flag(
            "--sequence-length T",
            "Tokens in a sequence. [that of a token file; the model's maximum, up to 2048]",
        ),
    ] = Field(default=None, ge=2, description="a whole number from 2")
    bos: bool = Field(default=True, description="true or false")
    microbatch_tokens: Annotated[
        int,
        Flag("--microbatch-tokens N", "Tokens in a microbatch; changes the bits of the result."),
    ] = Field(default=4096, ge=1, description="a whole number from 1")
    save_microbatches: Annotated[
        Annotated[int, Field(ge=0)] | Literal["by cost"],
        Flag(
            "--save-microbatches N",
            "Save partial sums every N microbatches, to resume after a lost worker; 0: never. "
            "[so that saving takes at most 5 % of the time]",
        ),
    ] = Field(default="by cost", description="a whole number from 0, or by cost")
    shards: Annotated[
        int,
        Flag(
            "--shards N",
            "Stream N parts of the calibration data in parallel, each through its own workers: "
            "for more workers than layers.",
        ),
    ] = Field(default=1, ge=1, description="a whole number from 1")


class EvaluationConfig(_Section):
    """What the perplexities are measured on."""

    source: Annotated[
        str,
        Flag(
            "--evaluation SRC", f"{SOURCES} [the evaluation split of embedded, stdlib or wikitext2]"
        ),
    ] = Field(default="", description=CalibrationConfig.model_fields["source"].description)
    sequences: Annotated[
        int | None,
        Flag(
            "--evaluation-sequences N",
            "Number of sequences. [all of a token file or wikitext2, 128 of other text]",
        ),
    ] = Field(default=None, ge=1, description="a whole number from 1")


class ServingConfig(_Section):
    """The load for which ``speedup`` and ``fit`` hold."""

    phase: Annotated[
        Literal["prefill", "decode"],
        Flag("--serving-phase NAME", "What --speedup is of: prefill or decode."),
    ] = Field(default="decode", description="prefill or decode")
    batch: Annotated[
        int, Flag("--serving-batch N", "Sequences at one time, for --speedup and --fit.")
    ] = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1")
    context: Annotated[
        int | None,
        Flag(
            "--serving-context T",
            "Tokens of each of them, for --speedup and --fit. [the model's maximum, up to 2048]",
        ),
    ] = Field(default=None, ge=1, le=MAX_COUNT, description="a whole number from 1")


class RecoverConfig(_Section):
    """Training of the compressed model on text, once it is made; all but the last key fix bytes.

    Attributes:
        data: ``calibration`` is the calibration data, ``self`` what the input model writes behind
            the first tokens of each of its sequences; or a source of text.
        tokens: to train on, counted as often as they are seen. One epoch of the data if None.
        parts: of a batch, whose gradients are summed in order: the most workers that can share a
            step.
        learning_rates: several are tried, from the highest until one is worse than the one before.
        relative: the rates are relative to the root mean square of each tensor.
        held_out: sequences at the end of the data that are not trained on; a sixteenth if None.
        seed: of the order of sequences; that of the recipe if None.
    """

    mode: Annotated[
        Literal["none", "local", "global"],
        Flag(
            "--recover MODE",
            "Train the compressed model on text: local, each layer alone to the output of the "
            "layer it was made from, or global, the whole model to the input model's logits. "
            "[none]",
        ),
    ] = Field(default="none", description="none, local or global")
    data: Annotated[
        str,
        Flag(
            "--recover-data SRC",
            "Text to train on: calibration, self (written by the input model), or a source as "
            "for --calibration. [calibration]",
        ),
    ] = Field(default="calibration", min_length=1, description="calibration, self, or a source")
    tokens: Annotated[
        int | None,
        Flag(
            "--recover-tokens N", "Tokens to train on, repeats counted. [those of the data, once]"
        ),
    ] = Field(default=None, ge=1, description="a whole number from 1")
    teacher: Annotated[
        str,
        Flag(
            "--recover-teacher MODEL",
            "The model whose logits are learnt, with the same vocabulary. [the input model]",
        ),
    ] = Field(default="", description="a directory, a URI, a Hub id, or an alias")
    prompt_tokens: int = Field(default=16, ge=1, le=MAX_COUNT, description="a whole number from 1")
    batch: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    parts: int | None = Field(default=None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    trains: Annotated[
        Literal["made", "all", "lora"],
        Flag(
            "--recover-trains WHAT",
            "made, the tensors that the cut made; all tensors of the layers; or lora, low-rank "
            "changes of their linears.",
        ),
    ] = Field(default="made", description="made, all or lora")
    replace: Annotated[
        Literal["none", "linear", "constant"],
        Flag(
            "--recover-replace HOW",
            "Put layers of the input model in the place of changed ones in the first half of the "
            "steps of global: fewer and fewer, linear, or half of them, constant. [none]",
        ),
    ] = Field(default="none", description="none, linear or constant")
    loss: Literal["kl", "labels"] = Field(default="kl", description="kl or labels")
    learning_rates: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        default=[0.01, 0.003, 0.001, 0.0003], min_length=1, max_length=8,
        description="a list of numbers above 0 and up to 1",
    )  # fmt: skip
    relative: bool = Field(default=True, description="true or false")
    schedule: Literal["cosine", "linear"] = Field(default="cosine", description="cosine or linear")
    warmup: int = Field(default=8, ge=0, le=MAX_COUNT, description="a whole number from 0")
    weight_decay: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 and below 1")
    clip: float = Field(default=0.0, ge=0, description="a number from 0")
    rank: int = Field(default=8, ge=1, le=MAX_COUNT, description="a whole number from 1")
    alpha: float = Field(default=16.0, gt=0, description="a number above 0")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="a number from 0 and below 1")
    held_out: int | None = Field(
        default=None, ge=1, le=MAX_COUNT, description="a whole number from 1"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1"
    )
    save_steps: int = Field(default=64, ge=1, le=MAX_COUNT, description="a whole number from 1")


class StepConfig(_Section):
    """One of several methods, applied one after the other.

    Attributes:
        method: a file of ``actors/methods``.
        keep_fraction: true fraction of the *input model's* parameters that is left after this step.
        slice: nominal fraction of the residual width to remove. One of the two is given.
        options: of the method; what is not given has the method's default.
    """

    method: str = Field(min_length=1, description="the name of a method")
    keep_fraction: float | None = Field(
        default=None, gt=0, le=1, description="a number above 0 and up to 1, such as 0.8"
    )
    slice: float | None = Field(
        default=None, ge=0, lt=1, description="a number from 0 and below 1, such as 0.25"
    )
    options: dict[str, str | int | float | bool] = Field(
        default={}, description="a mapping from option to value"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.method == QUANTISER:  # its options alone say a size
            if (self.keep_fraction, self.slice) != (None, None):
                raise ValueError(
                    f"keep_fraction, slice: {QUANTISER} removes no parameters; give options such "
                    "as bits=4 and group=64 alone"
                )
        elif (self.keep_fraction is None) == (self.slice is None):
            raise ValueError(
                "keep_fraction, slice: give one of them; it sets how much of the input "
                "model is left after this step"
            )
        return self

    @property
    def target(self) -> Target:
        """How small the model is to be after this step."""
        return Target(keep_fraction=self.keep_fraction, slice=self.slice)


SINGLE = ("method", "options", *SIZES)  # keys of a recipe of one method


class RunConfig(_Section):
    """One run: model, method, how small, on which data, with which machines.

    Attributes:
        model: a directory, an ``s3://`` or ``gs://`` URI, a Hub id, or an alias.
        options: of the method; what is not given has the method's default.
        layer_options: layer -> options of that layer alone, as `redo` leaves them.
        keep_fraction: in (0, 1]. At most one of this and ``slice`` is given; neither is 0.8.
        threads: part of what determines the bits.
        place_seconds: how long a worker may wait for a machine that can hold it.
        statistics_dtype: they are summed and factored in float64, whatever they are stored in.
    """

    model: str = Field(
        default="tiny", min_length=1, description="a directory, a URI, a Hub id, or an alias"
    )
    model_store: Annotated[
        str,
        Flag(
            "--model-store DIR",
            "A directory, such as a shared store of weights, into which links in MODEL may "
            "point; every worker needs access. [none: such links are refused]",
        ),
    ] = Field(default="", description="a directory")
    out: Annotated[str, Flag("--out URI", "Run directory. [runs/MODEL-METHOD-SIZE]")] = Field(
        default="", description="the run directory, a path or a URI"
    )
    method: Annotated[
        str,
        Flag(
            "--method NAME",
            f"Compression method. [{DEFAULT_METHOD}; {SLICED_METHOD} with --slice]",
        ),
    ] = Field(default="", description="the name of a method")
    options: Annotated[
        dict[str, str | int | float | bool],
        Flag("--option KEY=VALUE", "An option of the method; may be repeated. [see below]"),
    ] = Field(default={}, description="a mapping from option to value")
    multiple_of: Annotated[
        int | None,
        Flag(
            "--multiple-of N",
            "Every kept width is a multiple of N; 64 or 128 for quantised kernels. [8 for widths "
            "of at least 512 and heads of at least 64]",
        ),
    ] = Field(default=None, ge=1, le=MAX_COUNT, description="a whole number from 1")
    tensor_parallel: Annotated[
        int,
        Flag(
            "--tensor-parallel N",
            "GPUs over which the result will be divided: the multiple holds for the part of each.",
        ),
    ] = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1")
    layer_options: dict[int, dict[str, str | int | float | bool]] = Field(
        default={}, description="a mapping from layer to a mapping from option to value"
    )
    keep_fraction: Annotated[
        float | None,
        Flag(
            "--keep-fraction F",
            "Parameters kept / parameters before, true counts, embeddings included. "
            f"[{DEFAULT_KEEP_FRACTION}]",
        ),
    ] = Field(default=None, gt=0, le=1, description="a number above 0 and up to 1, such as 0.8")
    slice: Annotated[
        float | None,
        Flag(
            "--slice F",
            "Instead of --keep-fraction: the fraction of the residual width to remove, as in "
            "SliceGPT's paper; it removes fewer parameters.",
        ),
    ] = Field(default=None, ge=0, lt=1, description="a number from 0 and below 1, such as 0.25")
    speedup: Annotated[
        float | None,
        Flag(
            "--speedup F",
            "Instead of --keep-fraction: how many times as fast as the input model the result is "
            "to be, under the load of --serving-*; a worker measures times of layers. [none]",
        ),
    ] = Field(default=None, ge=1, le=MAX_COUNT, description="a number from 1, such as 1.3")
    fit: Annotated[
        str,
        Flag(
            "--fit SIZE",
            "Instead of --keep-fraction: memory, such as 24GB, that weights, the keys and values "
            "of the load of --serving-*, and workspace are to fit. [none]",
        ),
    ] = Field(
        default="",
        pattern=r"^$|^[0-9]{1,12}(\.[0-9]{1,6})?[kMGT]B$",
        description="a size such as 24GB",
    )
    keep_bytes: Annotated[
        str,
        Flag(
            "--keep-bytes SIZE",
            "Instead of --keep-fraction: bytes of the weights of the result as they are stored, "
            "such as 4GB; widths, bits and groups are chosen together. [none]",
        ),
    ] = Field(
        default="",
        pattern=r"^$|^[0-9]{1,12}(\.[0-9]{1,6})?[kMGT]B$",
        description="a size such as 4GB",
    )
    bits: Annotated[
        float | None,
        Flag(
            "--bits B",
            "Instead of --keep-fraction: bits of a weight, the mean over the linears, scales "
            "included. [none]",
        ),
    ] = Field(default=None, gt=0, le=32, description="a number above 0 and up to 32, such as 3.5")
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag(
            "--dtype DTYPE",
            "Of what is not quantised in the result: float32, bfloat16 or float16. [that of the "
            "input]",
        ),
    ] = Field(default="auto", description="auto, float32, bfloat16 or float16")
    serving: ServingConfig = ServingConfig()
    steps: Annotated[
        list[StepConfig],
        Flag(
            "--step METHOD:F[:KEY=VALUE...]",
            "One of several methods applied in order, instead of the four options above: F is the "
            "fraction of the input model's parameters left after it; slice=F: a nominal slice. "
            "Options follow, a colon "
            "before each: --step modegpt:0.9:modules=mlp,vo --step slicegpt:0.8",
        ),
    ] = Field(
        default=[],
        min_length=1,
        description="a list of steps, each a mapping with method, keep_fraction or slice, options",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    recover: RecoverConfig = RecoverConfig()
    seed: Annotated[int, Flag("--seed S", "Seed of the choice of sequences.")] = Field(
        default=0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1"
    )
    threads: Annotated[
        int, Flag("--threads N", "CPU threads of each worker; changes the bits of the result.")
    ] = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1")
    workers: Annotated[int, Flag("--workers N", "Number of workers (Ray actors).")] = Field(
        default=1, ge=1, le=MAX_COUNT, description="a whole number from 1"
    )
    address: Annotated[
        str,
        Flag(
            "--address ADDR",
            "Ray cluster: local (a Ray started for this command), auto, or HOST:PORT.",
        ),
    ] = Field(
        default="local", min_length=1, description="local, auto, or the address of a Ray cluster"
    )
    place_seconds: float = Field(
        default=600, gt=0, le=MAX_COUNT, description="a number above 0, in seconds"
    )
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Flag(
            "--device NAME",
            "cpu or cuda. [cuda if the cluster has or can add a GPU, or this machine has one]",
        ),
    ] = Field(default="auto", description="auto, cpu or cuda")
    calibration_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Flag(
            "--calibration-dtype DTYPE",
            "float32, bfloat16 or float16. [float32 on a CPU, else the model's own]",
        ),
    ] = Field(default="auto", description="auto, float32, bfloat16 or float16")
    statistics_dtype: Annotated[
        Literal["float64", "float32"],
        Flag(
            "--statistics-dtype DTYPE",
            "float64, or float32: half the disk for statistics, rounded by at most 6e-8 relative.",
        ),
    ] = Field(default="float64", description="float64 or float32")
    worker_gib: Annotated[
        float | None,
        Flag(
            "--worker-gib GIB",
            "Memory of a worker, for the plan. [its share of 80 % of this machine]",
        ),
    ] = Field(default=None, gt=0, le=MAX_COUNT, description="a number above 0, in GiB")
    keep_statistics: Annotated[
        bool, Flag("--keep-statistics", "Keep the statistics at the end, for --stats.")
    ] = Field(default=False, description="true or false")
    stats: Annotated[str, Flag("--stats URI", "Reuse the statistics of another run.")] = Field(
        default="", description="the URI of a run that kept its statistics"
    )

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        given = [key for key in SIZES if getattr(self, key) not in _OPEN]
        if len(given) > 1:
            all_ = "both" if len(given) == 2 else "all"  # noqa: PLR2004
            raise ValueError(
                f"{', '.join(given)}: {all_} are given; give "
                "only one of them, each sets the size of the result"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_one_method(self) -> Self:
        both = [key for key in SINGLE if self.steps and key in self.model_fields_set]
        if both:
            raise ValueError(
                f"{both[0]}: cannot be given with steps; each step has its own, so remove it here"
            )
        if self.steps and self.layer_options:
            raise ValueError(
                "layer_options: cannot be given with steps; only a run of one method has options "
                "for single layers"
            )
        for index, (step, later) in enumerate(pairwise(self.steps)):
            if later.keep_fraction and later.keep_fraction > (step.keep_fraction or 1):
                raise ValueError(
                    f"steps[{index + 1}].keep_fraction: is {later.keep_fraction}, more than "
                    f"the {step.keep_fraction} that steps[{index}] leaves; both are fractions of "
                    "the input model"
                )
        return self

    @property
    def chain(self) -> list[StepConfig]:
        """The steps, also where there is only one method."""
        if self.steps:
            return [
                step.model_copy(update={"options": {**self._of_all, **step.options}})
                for step in self.steps
            ]
        usual = DEFAULT_METHOD if self.slice is None else SLICED_METHOD
        # Not checked again: a speed or a memory is the size of the whole recipe.
        only = StepConfig.model_construct(
            method=self.method or usual,
            options={**self._of_all, **self.options},
            keep_fraction=self.target.keep_fraction,
            slice=self.slice,
        )
        return [only]

    @property
    def _of_all(self) -> dict[str, str | int | float | bool]:
        """The options that all methods share, where they are given."""
        found: dict[str, str | int | float | bool] = {}
        if self.multiple_of is not None:
            found["multiple_of"] = self.multiple_of
        if self.tensor_parallel > 1:
            found["tensor_parallel"] = self.tensor_parallel
        return found

    @property
    def target(self) -> Target:
        """How small the result is to be, the default included."""
        if self.slice is not None:
            return Target(slice=self.slice)
        if self.speedup is not None:
            return Target(speedup=self.speedup, load=self.load)
        if self.fit:
            return Target(fit=bytes_of(self.fit), load=self.load)
        if self.keep_bytes:
            return Target(keep_bytes=bytes_of(self.keep_bytes))
        if self.bits is not None:
            return Target(bits=self.bits)
        if self.method == QUANTISER and self.keep_fraction is None:
            return Target()
        return Target(keep_fraction=self.keep_fraction or DEFAULT_KEEP_FRACTION)

    @property
    def targets(self) -> list[Target]:
        """How small the result of each step is to be."""
        return [step.target for step in self.steps] or [self.target]

    @property
    def load(self) -> ServingLoad:
        """The load for which the result is made."""
        given = self.serving.model_dump(exclude_none=True)
        return ServingLoad(**given)


SECTIONS: Mapping[str, type[_Section]] = {
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
    "serving": ServingConfig,
    "recover": RecoverConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts of the model and the machines that fill what a recipe leaves open.

    Attributes:
        model_name: short name of the model, as in `actors.storage.sources.ModelSource`.
        longest: longest sequence the model takes.
        options: of each step, as `resolve_options` returns them.
        device: where ``device: auto`` computes.
        calibration_dtype: what ``calibration_dtype: auto`` is.
        worker_gib: memory that a worker has when the recipe sets no bound.
    """

    model_name: str
    longest: int
    options: Sequence[Mapping[str, Option]]
    device: Literal["cpu", "cuda"]
    calibration_dtype: Literal["float32", "bfloat16", "float16"]
    worker_gib: float


def out_of(config: RunConfig, model_name: str) -> str:
    """Return the run directory of a recipe whose model has this short name."""
    sizes = "-".join(
        f"{step.method}-{size_text(target, step.options)}"
        for step, target in zip(config.chain, config.targets, strict=True)
    )
    return config.out or f"runs/{model_name}-{sizes}"


def resolved(config: RunConfig, facts: Facts) -> RunConfig:
    """Return the recipe with every open value replaced by the value in use.

    Values that only the data determine stay None, for `with_tokens`: numbers of sequences that are
    not given, and the length of the sequences of a token file.

    Raises:
        ConfigError: the sequences are longer than the model takes.
    """
    own = "embedded" if config.model == "tiny" else "stdlib"
    source = config.calibration.source or own
    # A file has no evaluation split: measuring on the calibration data would be too optimistic.
    evaluation_source = config.evaluation.source or (
        source if source in SOURCES_WITH_SPLITS else own
    )
    length = config.calibration.sequence_length
    if length is None and not _holds_tokens(source):
        length = min(DEFAULT_SEQUENCE_LENGTH, facts.longest)
    if length is not None:
        where = "calibration.sequence_length: is"
        check_length(length, facts.longest, where=where)
    chain = [
        step.model_copy(update={"options": dict(options)})
        for step, options in zip(config.chain, facts.options, strict=True)
    ]
    last = chain[-1]
    context = config.serving.context or min(DEFAULT_SEQUENCE_LENGTH, facts.longest)
    check_length(context, facts.longest, where="serving.context: is")
    return config.model_copy(
        update={
            "serving": config.serving.model_copy(update={"context": context}),
            "out": out_of(config, facts.model_name),
            "steps": chain if config.steps else [],
            "method": last.method,
            "options": dict(last.options),
            "keep_fraction": last.keep_fraction,
            "slice": last.slice,
            "calibration": config.calibration.model_copy(
                update={"source": source, "sequence_length": length}
            ),
            "evaluation": config.evaluation.model_copy(update={"source": evaluation_source}),
            "device": facts.device if config.device == "auto" else config.device,
            "calibration_dtype": facts.calibration_dtype
            if config.calibration_dtype == "auto"
            else config.calibration_dtype,
            "worker_gib": config.worker_gib or facts.worker_gib,
        }
    )


def with_tokens(
    config: RunConfig, facts: Facts, *, calibration: tuple[int, int], evaluation: tuple[int, int]
) -> RunConfig:
    """Return a resolved recipe with the shapes (sequences, tokens) of the data that is used.

    Raises:
        ConfigError: a file of tokens holds sequences of another length than the recipe requests,
            or longer than the model takes.
    """
    sequences, length = calibration
    for key, longest in (("calibration", length), ("evaluation", evaluation[1])):
        where = f"{key}.source: has sequences of"
        check_length(longest, facts.longest, where=where)
    asked = config.calibration.sequence_length
    if asked not in (None, length):
        raise ConfigError(
            f"calibration.sequence_length: is {asked}, but {config.calibration.source} holds "
            f"sequences of {length} tokens, which are used unchanged",
            hint=f"remove it, or set it to {length}",
        )
    return config.model_copy(
        update={
            "calibration": config.calibration.model_copy(
                update={"sequences": sequences, "sequence_length": length}
            ),
            "evaluation": config.evaluation.model_copy(update={"sequences": evaluation[0]}),
        }
    )


def to_yaml(config: RunConfig, given: RunConfig) -> str:
    """Return ``config`` as a recipe; what ``given`` did not set is marked ``# default``."""
    lines = _yaml_lines(recipe_values(config), given.model_dump(exclude_unset=True))
    return "\n".join(lines) + "\n"


def recipe_values(config: RunConfig) -> dict[str, Any]:
    """Return the keys of a recipe with their values: one method, or steps, never both."""
    values = config.model_dump()
    if not config.steps:
        del values["steps"]
        return values
    values["steps"] = [
        {key: value for key, value in step.items() if value is not None} for step in values["steps"]
    ]
    return {key: value for key, value in values.items() if key not in SINGLE}


def size_text(target: Target, options: Mapping[str, Option]) -> str:
    """Return ``keep0.80`` or ``slice0.25``: two digits, more if two would be ambiguous.

    Where options alone say a size it is ``4bit-g128``.
    """
    if not target.asked:
        return f"{options.get('bits', 4)}bit-g{options.get('group', 128)}"
    ((name, value),) = target.asked.items()
    if name in ("fit", "keep_bytes"):
        return f"{name.removeprefix('keep_')}{size_of(round(value))}"
    name = name.removesuffix("_fraction")
    short = f"{value:.2f}"
    return name + (short if float(short) == value else str(value))


def bytes_of(size: str) -> int:
    """Return the bytes of a size such as ``24GB``, in vendors' powers of ten."""
    power = "kMGT".index(size[-2]) + 1
    return round(float(size[:-2]) * float(1000**power))


def size_of(num_bytes: int) -> str:
    """Return bytes as a size such as ``300kB``, all digits of it, in the largest unit below it."""
    power = max((p for p in range(1, 5) if num_bytes >= 1000**p), default=1)
    return f"{num_bytes / 1000**power:.12g}{'kMGT'[power - 1]}B"


def _holds_tokens(source: str) -> bool:
    return source == "embedded" or source.startswith("tokens:")


def check_length(length: int, longest: int, *, where: str) -> None:
    """Refuse sequences longer than the maximum of a model, as its config says.

    Raises:
        ConfigError: they are.
    """
    if length > longest:
        raise ConfigError(
            f"{where} {length} tokens, but the model accepts at most {longest} "
            "(max_position_embeddings)",
            hint=f"use sequences of {longest} tokens or less",
        )


def _yaml_lines(values: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        typed = given.get(key)
        if isinstance(value, dict) and value:
            yield f"{key}:"
            inner = _yaml_lines(value, typed or {})
            yield from (textwrap.indent(line, "  ") for line in inner)
        else:
            text = yaml.safe_dump({key: value}, width=math.inf)
            yield text.rstrip("\n") + ("  # default" if typed in _OPEN else "")
