"""The recipe: what the user typed, as frozen data, and what fills that which it leaves open."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from planners.errors import ConfigError
from planners.method import Option, Target

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


class CalibrationConfig(_Section):
    """What the statistics are summed over.

    Attributes:
        source: see `actors.storage.tokens`; empty is ``embedded`` for the model tiny, else
            ``stdlib``.
        sequences: how many; None is as many as there are, of text at most 128.
        sequence_length: tokens of each; None is the file's, of text the model's context up to 2048.
        bos: each sequence cut from text begins with the tokenizer's BOS, if it has one.
        microbatch_tokens: tokens that go through a stage in one call.
        save_microbatches: a stage keeps its partial sums, to go on from after a loss, each time it
            has seen so many; 0 is never. ``by cost`` is where it is worth it: saving takes at most
            5 % of the time, and work of less than a minute is not saved.
        shards: parts of the sequences that are summed by themselves, side by side where there are
            workers for it, and then added in order. It is part of what determines the bytes.
    """

    source: str = Field(
        default="",
        description="stdlib, wikitext2, embedded, a .txt, .jsonl or .parquet file, "
        "or tokens:FILE.safetensors",
    )
    sequences: int | None = Field(default=None, ge=1, description="a whole number from 1")
    sequence_length: int | None = Field(default=None, ge=2, description="a whole number from 2")
    bos: bool = Field(default=True, description="true or false")
    microbatch_tokens: int = Field(default=4096, ge=1, description="a whole number from 1")
    save_microbatches: Annotated[int, Field(ge=0)] | Literal["by cost"] = Field(
        default="by cost", description="a whole number from 0, or by cost"
    )
    shards: int = Field(default=1, ge=1, description="a whole number from 1")


class EvaluationConfig(_Section):
    """What the perplexities are measured on.

    Attributes:
        source: as for calibration; empty is the same one where it has an evaluation split.
        sequences: how many; None is as many as there are, of text at most 128, but all of
            ``wikitext2``.
    """

    source: str = Field(
        default="", description=CalibrationConfig.model_fields["source"].description
    )
    sequences: int | None = Field(default=None, ge=1, description="a whole number from 1")


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
        if (self.keep_fraction is None) == (self.slice is None):
            raise ValueError(
                "keep_fraction, slice: give one of them; each step says how much of the input "
                "model is left after it"
            )
        return self

    @property
    def target(self) -> Target:
        """How small the model is to be after this step."""
        return Target(keep_fraction=self.keep_fraction, slice=self.slice)


SINGLE = ("method", "options", "keep_fraction", "slice")  # keys of a recipe of one method


class RunConfig(_Section):
    """One run: model, method, how small, on which data, with which machines.

    Attributes:
        model: a directory, an ``s3://`` or ``gs://`` URI, a Hub id, or an alias.
        model_store: a directory that links in the model's directory may lead into; none if empty.
        out: run directory; empty is ``runs/MODEL-METHOD-SIZE``.
        method: a file of ``actors/methods``; empty is ``modegpt``, with a nominal slice
            ``slicegpt``.
        options: of the method; what is not given has the method's default.
        layer_options: layer -> options of that layer alone, as `redo` leaves them.
        keep_fraction: true parameters kept over parameters before, in (0, 1].
        slice: nominal fraction of the residual width to remove, in [0, 1). At most one of the two
            is given; neither is ``keep_fraction`` 0.8.
        steps: several methods in the place of method, options, keep_fraction and slice.
        calibration: what the statistics are summed over.
        evaluation: what the perplexities are measured on.
        seed: of the choice of sequences.
        threads: CPU threads of each unit of work; part of what determines the bits.
        workers: how many.
        address: of a Ray cluster; ``local`` starts one for this command and stops it afterwards.
        place_seconds: how long a worker may wait for a machine that can hold it.
        device: where the workers compute.
        calibration_dtype: of the activations.
        statistics_dtype: of the sums as they are stored; float32 halves the disk they take and
            rounds each by at most 6e-8 of itself. They are summed and factored in float64.
        worker_gib: memory a worker may use, in GiB; None is what its device has.
        keep_statistics: keep the statistics after the last unit that needs them.
        stats: another run, whose statistics are used where they are of the same model and data.
    """

    model: str = Field(
        default="tiny", min_length=1, description="a directory, a URI, a Hub id, or an alias"
    )
    model_store: str = Field(default="", description="a directory")
    out: str = Field(default="", description="the run directory, a path or a URI")
    method: str = Field(default="", description="the name of a method")
    options: dict[str, str | int | float | bool] = Field(
        default={}, description="a mapping from option to value"
    )
    layer_options: dict[int, dict[str, str | int | float | bool]] = Field(
        default={}, description="a mapping from layer to a mapping from option to value"
    )
    keep_fraction: float | None = Field(
        default=None, gt=0, le=1, description="a number above 0 and up to 1, such as 0.8"
    )
    slice: float | None = Field(
        default=None, ge=0, lt=1, description="a number from 0 and below 1, such as 0.25"
    )
    steps: list[StepConfig] = Field(
        default=[],
        min_length=1,
        description="a list of steps, each a mapping with method, keep_fraction or slice, options",
    )
    calibration: CalibrationConfig = CalibrationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(default=0, ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")
    threads: int = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1")
    workers: int = Field(default=1, ge=1, le=MAX_COUNT, description="a whole number from 1")
    address: str = Field(
        default="local", min_length=1, description="local, auto, or the address of a Ray cluster"
    )
    place_seconds: float = Field(
        default=600, gt=0, le=MAX_COUNT, description="a number above 0, in seconds"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto, cpu or cuda")
    calibration_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto, float32, bfloat16 or float16"
    )
    statistics_dtype: Literal["float64", "float32"] = Field(
        default="float64", description="float64 or float32"
    )
    worker_gib: float | None = Field(
        default=None, gt=0, le=MAX_COUNT, description="a number above 0, in GiB"
    )
    keep_statistics: bool = Field(default=False, description="true or false")
    stats: str = Field(default="", description="the URI of a run that kept its statistics")

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.keep_fraction is not None and self.slice is not None:
            raise ValueError(
                "keep_fraction, slice: both are given; give one of them, they are two ways to say "
                "how small the result is"
            )
        return self

    @model_validator(mode="after")
    def _steps_or_one_method(self) -> Self:
        both = [key for key in SINGLE if self.steps and key in self.model_fields_set]
        if both:
            raise ValueError(
                f"{both[0]}: is given beside steps; each step has its own, so leave it out here"
            )
        if self.steps and self.layer_options:
            raise ValueError(
                "layer_options: is given beside steps; a layer has options of its own in a run of "
                "one method only"
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
            return self.steps
        target = self.target
        usual = DEFAULT_METHOD if target.slice is None else SLICED_METHOD
        only = StepConfig(
            method=self.method or usual,
            options=self.options,
            keep_fraction=target.keep_fraction,
            slice=target.slice,
        )
        return [only]

    @property
    def target(self) -> Target:
        """How small the result is to be, the default included."""
        if self.slice is not None:
            return Target(slice=self.slice)
        return Target(keep_fraction=self.keep_fraction or DEFAULT_KEEP_FRACTION)


SECTIONS: Mapping[str, type[_Section]] = {
    "calibration": CalibrationConfig,
    "evaluation": EvaluationConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the model and the machines say, to fill what a recipe leaves open.

    Attributes:
        model_name: short name of the model, as in `actors.storage.sources.ModelSource`.
        longest: longest sequence the model takes.
        longest_key: of its config, which says so.
        options: of each step, as `resolve_options` returns them.
        device: where ``device: auto`` computes.
        calibration_dtype: what ``calibration_dtype: auto`` is.
        worker_gib: memory that a worker has when the recipe sets no bound.
    """

    model_name: str
    longest: int
    longest_key: str
    options: Sequence[Mapping[str, Option]]
    device: Literal["cpu", "cuda"]
    calibration_dtype: Literal["float32", "bfloat16", "float16"]
    worker_gib: float


def resolved(config: RunConfig, facts: Facts) -> RunConfig:
    """Return the recipe with all that is left open replaced by what is used.

    Only what the data alone can say stays None, for `with_tokens`: numbers of sequences that are
    not given, and the length of those that a file of tokens holds.

    Raises:
        ConfigError: the sequences are longer than the model takes.
    """
    own = "embedded" if config.model == "tiny" else "stdlib"
    source = config.calibration.source or own
    # A file has no evaluation split: measuring on what was calibrated on would flatter.
    evaluation_source = config.evaluation.source or (
        source if source in SOURCES_WITH_SPLITS else own
    )
    length = config.calibration.sequence_length
    if length is None and not _holds_tokens(source):
        length = min(DEFAULT_SEQUENCE_LENGTH, facts.longest)
    if length is not None:
        where = "calibration.sequence_length: is"
        check_length(length, facts.longest, facts.longest_key, where=where)
    chain = [
        step.model_copy(update={"options": dict(options)})
        for step, options in zip(config.chain, facts.options, strict=True)
    ]
    sizes = "-".join(f"{step.method}-{_size(step.target)}" for step in chain)
    last = chain[-1]
    return config.model_copy(
        update={
            "out": config.out or f"runs/{facts.model_name}-{sizes}",
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
        ConfigError: a file of tokens holds sequences of another length than the recipe asks for,
            or longer than the model takes.
    """
    sequences, length = calibration
    for key, longest in (("calibration", length), ("evaluation", evaluation[1])):
        where = f"{key}.source: has sequences of"
        check_length(longest, facts.longest, facts.longest_key, where=where)
    asked = config.calibration.sequence_length
    if asked not in (None, length):
        raise ConfigError(
            f"calibration.sequence_length: is {asked}, but {config.calibration.source} holds "
            f"sequences of {length} tokens, which are used as they are",
            hint=f"leave it out, or give {length}",
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


def _size(target: Target) -> str:
    """Return ``keep0.80`` or ``slice0.25``: two digits, more where two would not tell it apart."""
    name, value = ("keep", target.keep_fraction)
    if target.slice is not None:
        name, value = ("slice", target.slice)
    short = f"{value:.2f}"
    return name + (short if float(short) == value else str(value))


def _holds_tokens(source: str) -> bool:
    return source == "embedded" or source.startswith("tokens:")


def check_length(length: int, longest: int, key: str, *, where: str) -> None:
    """Refuse sequences that are longer than a model takes, as that key of its config says.

    Raises:
        ConfigError: they are.
    """
    if length > longest:
        raise ConfigError(
            f"{where} {length} tokens, but the model takes at most {longest} ({key})",
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
