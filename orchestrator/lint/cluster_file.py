"""A cluster file with the line of each value, and the findings in it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrator.backend.capacity import mapping
from planners.errors import ConfigError

Level = Literal["error", "warning", "note"]
Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong in a cluster file.

    Attributes:
        level: an ``error`` costs money, work or safety; a ``warning`` may; a ``note`` is to be
            filled in.
        line: counted from 1.
        path: dotted path of the key.
        why: what is wrong, and its consequence.
        fix: the correct setting.
    """

    level: Level
    line: int
    path: str
    why: str
    fix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterFile:
    """A cluster file as it was parsed.

    Attributes:
        path: as given.
        values: the mapping that it holds.
        lines: key -> line, from 1.
    """

    path: str
    values: Mapping[str, Any]
    lines: Mapping[Key, int]

    def finding(self, level: Level, key: Key, why: str, fix: str) -> Finding:
        """Return a finding at a key, or at the nearest one above it that the file has."""
        near = key
        while near and near not in self.lines:
            near = near[:-1]
        path = ".".join(map(str, key))
        return Finding(level=level, line=self.lines.get(near, 1), path=path, why=why, fix=fix)

    @property
    def provider(self) -> Mapping[str, Any]:
        """The provider section; empty where there is none."""
        return mapping(self.values.get("provider"))

    @property
    def node_types(self) -> Mapping[str, Mapping[str, Any]]:
        """Name -> node type."""
        types = mapping(self.values.get("available_node_types"))
        return {str(name): mapping(each) for name, each in types.items()}

    @property
    def head(self) -> str:
        """Name of the head's node type."""
        return str(self.values.get("head_node_type", ""))

    def commands(self, *keys: str) -> Iterator[tuple[Key, str]]:
        """Yield the key and text of every command below some top-level keys."""
        for name in keys:
            found = self.values.get(name)
            if isinstance(found, Sequence) and not isinstance(found, str):
                yield from (((name, index), str(text)) for index, text in enumerate(found))


def read_cluster_file(path: str) -> ClusterFile:
    """Return a cluster file with its lines.

    Raises:
        ConfigError: it cannot be read, or is no YAML mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="give a cluster file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: is not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping", hint="cluster.yaml is one to begin with")
    return ClusterFile(path=path, values=values, lines=dict(_lines(node, ())))


def _lines(node: yaml.Node | None, key: Key) -> Iterator[tuple[Key, int]]:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            inner = (*key, str(name.value))
            yield inner, name.start_mark.line + 1
            yield from _lines(value, inner)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*key, index), value.start_mark.line + 1
            yield from _lines(value, (*key, index))
