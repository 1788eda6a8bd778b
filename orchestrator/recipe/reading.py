"""Reading a recipe: a YAML file and the command line, every error naming the key's path."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from actors import methods
from orchestrator.recipe import presets
from orchestrator.recipe.config import SECTIONS, RunConfig, StepConfig
from orchestrator.recipe.wording import nearest_key, printable, short
from planners.errors import ConfigError
from planners.method import SIZES
from planners.spelling import did_you_mean


def load_config(recipe_path: str | None, overrides: Mapping[str, object]) -> RunConfig:
    """Return the recipe in a YAML file with the command line's values on top.

    Args:
        recipe_path: the file, or the name of a recipe of the package; None is an empty recipe.
        overrides: dotted key, e.g. ``calibration.source`` or ``options.round_to``, -> value. A
            None was not given on the command line and changes nothing. A size here,
            such as ``slice``, replaces that of the file.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, wrong or contradicts another.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    recipe = {} if recipe_path is None else _read_recipe(Path(recipe_path))
    if given.keys() & {*SIZES}:
        recipe = {k: v for k, v in recipe.items() if k not in SIZES}
    for key, value in given.items():
        recipe = _with_override(recipe, key, value)
    try:
        config = RunConfig.model_validate(recipe)
    except ValidationError as error:
        # A wrong value of a union gives one error for each member; one line a key is enough.
        lines = dict.fromkeys(_explain(e["type"], e["loc"], e) for e in error.errors())
        raise ConfigError("\n".join(lines)) from error
    for index, step in enumerate(config.chain):
        where = f"steps[{index}].method" if config.steps else "method"
        methods.require(step.method, where=where)
    return config


def _recipe_text(path: Path) -> str:
    """Return the text of a file, or if there is none of the included recipe of that name."""
    if not path.is_file() and str(path) in presets.available():
        return presets.text(str(path))
    return path.read_text(encoding="utf-8")


def _read_recipe(path: Path) -> dict[object, object]:
    try:
        data = yaml.safe_load(_recipe_text(path))
    except OSError as error:
        raise ConfigError(
            f"recipe {path}: {error.strerror}{did_you_mean(str(path), presets.available())}",
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
            hint="one `key: value` per line, such as `model: tiny`",
        )
    if "runs" in data:
        raise ConfigError(
            f"recipe {path}: is a batch file, of many runs", hint=f"compress-cluster batch {path}"
        )
    return data


def _with_override(recipe: dict[object, object], key: str, value: object) -> dict[object, object]:
    """Return the recipe with one value set; a wrong section stays, for validation to report."""
    name, _, inner = key.partition(".")
    if not inner:
        return {**recipe, name: value}
    section = recipe.get(name, {})
    return {**recipe, name: {**section, inner: value}} if isinstance(section, dict) else recipe


def _explain(kind: str, loc: tuple[int | str, ...], error: Mapping[str, Any]) -> str:
    """Return one line: the key's path, what is wrong with it, and what is expected."""
    step, loc = _step_of(loc)
    if kind == "value_error":
        return f"{step}{error['ctx']['error']}"
    if not loc:
        known = ", ".join(StepConfig.model_fields)
        said = short(error["input"])
        return f"{step.rstrip('.')}: is {said}; it must be a mapping with keys of: {known}"
    if loc[0] == "layer_options":
        expected = RunConfig.model_fields["layer_options"].description
        return f"layer_options: is {short(error['input'])}; it must be {expected}"
    if loc[0] == "options" and len(loc) > 1:
        # What follows the option's name are the members of the union.
        said = short(error["input"])
        return f"{step}options.{loc[1]}: is {said}; it must be a text or a number"
    path = step + ".".join(printable(str(part)) for part in loc)
    section = SECTIONS.get(str(loc[0]), RunConfig) if len(loc) > 1 else RunConfig
    section = StepConfig if step else section
    if kind == "missing":
        return f"{path}: is missing; it must be {section.model_fields[str(loc[-1])].description}"
    if kind in ("extra_forbidden", "invalid_key"):
        known = f"; known here: {', '.join(section.model_fields)}"
        keys = [f"{step}{key}" for key in StepConfig.model_fields] if step else _known_keys()
        return f"{path}: unknown key" + (nearest_key(path, keys) or known)
    expected = section.model_fields[str(loc[-1])].description
    if path in SECTIONS:
        expected = f"a mapping with keys of: {', '.join(SECTIONS[path].model_fields)}"
    said = f"{path}: is {short(error['input'])}; it must be {expected}"
    words = re.findall(r"'(\w+)'", str(error["ctx"]["expected"])) if kind == "literal_error" else []
    return said + did_you_mean(error["input"], words)


def _step_of(loc: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """Return ``steps[1].`` and the rest of a path, or nothing and the path."""
    if loc[:1] == ("steps",) and len(loc) > 1:
        return f"steps[{loc[1]}].", loc[2:]
    return "", loc


def _known_keys() -> list[str]:
    nested = [f"{name}.{key}" for name, part in SECTIONS.items() for key in part.model_fields]
    return [*RunConfig.model_fields, *nested]
