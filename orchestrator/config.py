"""The recipe: what the user typed, as frozen data, with every error naming the key's path."""

import difflib
import math
import reprlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orchestrator import recipes
from planners.errors import ConfigError
from planners.plan import MethodSpec, Option, OptionSpec, Target

DEFAULT_KEEP_FRACTION = 0.8
DEFAULT_SEQUENCE_LENGTH = 2048
SOURCES_WITH_SPLITS = ("embedded", "stdlib", "wikitext2")

MAX_COUNT = 2**20
MAX_NUMBER = 2**63
MAX_SHOWN = 200  # characters of a value in a message
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
        out: run directory; empty is ``runs/MODEL-METHOD-SIZE``.
        method: a file of ``actors/methods``.
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
    out: str = Field(default="", description="the run directory, a path or a URI")
    method: str = Field(default="slicegpt", min_length=1, description="the name of a method")
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
        only = StepConfig(
            method=self.method,
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


_SECTIONS: Mapping[str, type[_Section]] = {
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


def load_config(recipe_path: str | None, overrides: Mapping[str, object]) -> RunConfig:
    """Return the recipe in a YAML file with the command line's values on top.

    Args:
        recipe_path: the file, or the name of a recipe of the package; None is an empty recipe.
        overrides: dotted key, e.g. ``calibration.source`` or ``options.round_to``, -> value. A
            None was not given on the command line and changes nothing. A ``slice`` here replaces
            a ``keep_fraction`` of the file, and the other way round.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, wrong or contradicts another.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = {} if recipe_path is None else _read_recipe(Path(recipe_path))
    if {"keep_fraction", "slice"} & given.keys():
        recipe = {k: v for k, v in recipe.items() if k not in ("keep_fraction", "slice")}
    for key, value in given.items():
        recipe = _with_override(recipe, key, value)
    try:
        return RunConfig.model_validate(recipe)
    except ValidationError as error:
        # A wrong value of a union gives one error for each member; one line a key is enough.
        lines = dict.fromkeys(_explain(e["type"], e["loc"], e) for e in error.errors())
        raise ConfigError("\n".join(lines)) from error


def resolve_steps(config: RunConfig, specs: Sequence[MethodSpec]) -> list[dict[str, Option]]:
    """Return the options of every step.

    Raises:
        ConfigError: a method has no such option, or not with this value; the message has the path.
    """
    found = []
    for index, (step, spec) in enumerate(zip(config.chain, specs, strict=True)):
        try:
            found.append(resolve_options(spec, step.options))
        except ConfigError as error:
            where = f"steps[{index}]." if config.steps else ""
            raise ConfigError(f"{where}{error}", hint=error.hint) from error
    return found


def resolve_options(spec: MethodSpec, options: Mapping[str, object]) -> dict[str, Option]:
    """Return a value for every option of a method, in the type of its default.

    Texts such as ``true``, ``16`` and ``0.5`` are read as what the default is, because
    ``--option KEY=VALUE`` has only texts.

    Raises:
        ConfigError: the method has no such option, or not with this value.
    """
    known = {option.name: option for option in spec.options}
    for name in options:
        if name not in known:
            raise ConfigError(
                f"options.{_printable(name)}: {spec.name} has no such option"
                + _nearest(name, list(known)),
                hint="its options and defaults: "
                + (", ".join(f"{o.name}={_text(o.default)}" for o in spec.options) or "none"),
            )
    return {
        name: _checked(option, options[name]) if name in options else option.default
        for name, option in known.items()
    }


# Options of a method that decide widths, statistics or what other units do.
OF_ALL_LAYERS = frozenset({
    "allocation", "modules", "round_to", "temperature", "grid", "probe_tokens", "servable",
    "rotation", "pca_on", "slice_head", "schedule", "refit",
})  # fmt: skip


def resolve_layer_options(
    spec: MethodSpec, given: Mapping[int, Mapping[str, object]]
) -> dict[int, dict[str, Option]]:
    """Return layer -> the options that it has for itself, each in the type of its default.

    Raises:
        ConfigError: the method has no such option, or no layer can have it alone.
    """
    found: dict[int, dict[str, Option]] = {}
    for layer, options in given.items():
        resolved_ = resolve_options(spec, options)
        for name in options:
            if name in OF_ALL_LAYERS:
                own = [option.name for option in spec.options if option.name not in OF_ALL_LAYERS]
                raise ConfigError(
                    f"layer_options.{layer}.{name}: all layers of a run share it",
                    hint=f"a layer of {spec.name} can have its own: {', '.join(own) or 'nothing'}",
                )
        found[layer] = {name: resolved_[name] for name in options}
    return found


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
        _check_length(length, facts, where=where)
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
        _check_length(longest, facts, where=where)
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


def _recipe_text(path: Path) -> str:
    """Return a file, or where there is none the recipe of that name that comes with the package."""
    if not path.exists() and str(path) in recipes.available():
        return recipes.text(str(path))
    return path.read_text(encoding="utf-8")


def _read_recipe(path: Path) -> dict[object, object]:
    try:
        data = yaml.safe_load(_recipe_text(path))
    except OSError as error:
        raise ConfigError(
            f"recipe {path}: {error.strerror}",
            hint="give the path of a YAML file, or a name from `compress-cluster recipes ls`",
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"recipe {path}, line {line}: is not YAML: {error.problem}") from error
    # ValueError: not UTF-8, or no such date; RecursionError: lists in lists in lists.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"recipe {path}: is not YAML: {error}") from error
    if data is None:  # An empty file, or only comments: all defaults.
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"recipe {path}: is a {type(data).__name__}; it must be a mapping",
            hint="one `key: value` a line, such as `model: tiny`",
        )
    return data


def _with_override(recipe: dict[object, object], key: str, value: object) -> dict[object, object]:
    """Return the recipe with one value set; what is no mapping stays, to be complained about."""
    name, _, inner = key.partition(".")
    if not inner:
        return {**recipe, name: value}
    section = recipe.get(name, {})
    return {**recipe, name: {**section, inner: value}} if isinstance(section, dict) else recipe


def _explain(kind: str, loc: tuple[int | str, ...], error: Mapping[str, Any]) -> str:
    """Return one line: the key's path, what is wrong with it, and what would be right."""
    step, loc = _step_of(loc)
    if kind == "value_error":
        return f"{step}{error['ctx']['error']}"
    if not loc:
        known = ", ".join(StepConfig.model_fields)
        said = _short(error["input"])
        return f"{step.rstrip('.')}: is {said}; it must be a mapping with keys of: {known}"
    if loc[0] == "layer_options":
        expected = RunConfig.model_fields["layer_options"].description
        return f"layer_options: is {_short(error['input'])}; it must be {expected}"
    if loc[0] == "options" and len(loc) > 1:
        # What follows the option's name are the members of the union.
        said = _short(error["input"])
        return f"{step}options.{loc[1]}: is {said}; it must be a text or a number"
    path = step + ".".join(_printable(str(part)) for part in loc)
    section = _SECTIONS.get(str(loc[0]), RunConfig) if len(loc) > 1 else RunConfig
    section = StepConfig if step else section
    if kind == "missing":
        return f"{path}: is missing; it must be {section.model_fields[str(loc[-1])].description}"
    if kind in ("extra_forbidden", "invalid_key"):
        known = f"; known here: {', '.join(section.model_fields)}"
        keys = [f"{step}{key}" for key in StepConfig.model_fields] if step else _known_keys()
        return f"{path}: unknown key" + (_nearest(path, keys) or known)
    expected = section.model_fields[str(loc[-1])].description
    if path in _SECTIONS:
        expected = f"a mapping with keys of: {', '.join(_SECTIONS[path].model_fields)}"
    return f"{path}: is {_short(error['input'])}; it must be {expected}"


def _step_of(loc: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """Return ``steps[1].`` and the rest of a path, or nothing and the path."""
    if loc[:1] == ("steps",) and len(loc) > 1:
        return f"steps[{loc[1]}].", loc[2:]
    return "", loc


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _short(value: object) -> str:
    """Return a value as it is in Python, cut where it is long."""
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return "a huge number"  # which Python may refuse to print
    return "empty" if value in (None, "") else reprlib.repr(value)[:MAX_SHOWN]


def _known_keys() -> list[str]:
    nested = [f"{name}.{key}" for name, part in _SECTIONS.items() for key in part.model_fields]
    return [*RunConfig.model_fields, *nested]


def _nearest(path: str, known: list[str]) -> str:
    """Return the known keys whose last part is nearest to that of an unknown one, as a question."""
    section, _, name = path.rpartition(".")
    leaves = {key: key.rpartition(".")[2] for key in known}
    nearest = difflib.get_close_matches(name, sorted(set(leaves.values())), n=1)
    found = [key for key, leaf in leaves.items() if leaf in nearest]
    here = [key for key in found if key.rpartition(".")[0] == section]
    return f"; did you mean {' or '.join(here or found)}?" if found else ""


def _checked(option: OptionSpec, value: object) -> Option:
    """Return the value of an option in its type."""
    converted = _converted(option.default, value)
    if converted is None:
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(
            f"options.{option.name}: is {value!r}; it must be {kind[type(option.default)]}"
        )
    if option.choices and converted not in option.choices:
        choices = ", ".join(map(_text, option.choices))
        raise ConfigError(f"options.{option.name}: is {value!r}; it must be one of: {choices}")
    if option.minimum is not None and float(converted) < option.minimum:
        raise ConfigError(
            f"options.{option.name}: is {value!r}; it must be {option.minimum:g} or more"
        )
    return converted


def _converted(default: Option, value: object) -> Option | None:
    """Return ``value`` in the type of ``default``, or None where it cannot be read as that."""
    if isinstance(default, bool):
        word = value.lower() if isinstance(value, str) else value
        return {"true": True, "false": False}.get(_text(word))
    if isinstance(default, str):
        return value if isinstance(value, str) else None
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = type(default)(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not -MAX_NUMBER < value < MAX_NUMBER:
        return None
    if isinstance(default, int):
        return value if isinstance(value, int) else None
    return float(value)


def _text(value: object) -> str:
    """Return a value as it is typed in a recipe."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(target: Target) -> str:
    """Return ``keep0.80`` or ``slice0.25``: two digits, more where two would not tell it apart."""
    name, value = ("keep", target.keep_fraction)
    if target.slice is not None:
        name, value = ("slice", target.slice)
    short = f"{value:.2f}"
    return name + (short if float(short) == value else str(value))


def _holds_tokens(source: str) -> bool:
    return source == "embedded" or source.startswith("tokens:")


def _check_length(length: int, facts: Facts, *, where: str) -> None:
    longest = facts.longest
    if length > longest:
        raise ConfigError(
            f"{where} {length} tokens, but the model takes at most {longest} ({facts.longest_key})",
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
