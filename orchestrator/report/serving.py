"""The engines that serve a result, as lines of a page in Markdown."""

from collections.abc import Mapping
from typing import Any

from planners.serving import served


def serving_lines(config: Mapping[str, Any], path: str) -> list[str]:
    """Return a line for each engine: the command that loads the model of this config, or why not.

    Args:
        config: its ``config.json``.
        path: where it is, as the commands name it.
    """
    lines = []
    for each in served(config):
        note = f" ({each.note})" if each.note else ""
        command = f"`{each.command.format(path=path)}`{note}"
        lines.append(f"- {each.engine}: {command if each.command else f'no: {each.note}'}")
    return lines
