"""The engines that serve a result, for its card, the report and the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from planners.serving import served


def serving(config: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the engines as ``report.json`` has them: name, command and note of each."""
    return [asdict(each) for each in served(config)]


def serving_pairs(
    engines: Sequence[Mapping[str, Any]], path: str, *, quoted: bool = True
) -> list[tuple[str, str]]:
    """Return each engine with the command that loads the model, or why there is none.

    Args:
        engines: as `serving` returns them.
        path: where the model is, as the commands name it.
        quoted: commands are set between backticks.
    """
    mark = "`" if quoted else ""
    found = []
    for each in engines:
        command, note = str(each["command"]).replace("{path}", path), str(each["note"])
        said = (
            f"{mark}{command}{mark}" + (f" ({note})" if note else "") if command else f"no: {note}"
        )
        found.append((str(each["engine"]), said))
    return found


def serving_lines(engines: Sequence[Mapping[str, Any]], path: str) -> list[str]:
    """Return the same as a list in Markdown."""
    return [f"- {engine}: {said}" for engine, said in serving_pairs(engines, path)]


def takers(engines: Sequence[Mapping[str, Any]]) -> str:
    """Return in words which engines take a result, and which do not; empty if none is known."""
    yes = [str(each["engine"]) for each in engines if each.get("command")]
    no = [str(each["engine"]) for each in engines if not each.get("command")]
    return ", ".join(yes) + (f"; not {', '.join(no)}" if no else "")
