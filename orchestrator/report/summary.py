"""What a run came to, in one sentence and one table; the page and the terminal say the same."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report.document import Document, layers, rows, section
from orchestrator.report.numbers import (
    bytes_text,
    change,
    count,
    counted,
    decimal,
    number,
    percent,
    quotient,
    seconds_text,
    short_count,
    times,
)
from orchestrator.report.over_plan import over_plan
from orchestrator.report.quality import quality, told

_NOTICEABLE = 0.005
_REMOTE = ", trust_remote_code=True"
_TILES = ("Perplexity", "Parameters", "Checkpoint size", "Decode, tokens/s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One measure before and after.

    Attributes:
        before_short: as ``before``, short enough for a tile.
        tone: ``good``, ``cost`` or nothing, for the change.
    """

    name: str
    before: str
    after: str
    before_short: str
    after_short: str
    change: str
    ratio: str
    tone: str


def title(report: Document) -> str:
    """Return what the report is about."""
    given = report.get("title")
    if given:
        return str(given)
    model = section(report, "model").get("source") or "model"
    return " \u00b7 ".join([str(model), *method_names(report)])


def verdict(report: Document) -> str:
    """Return the verdict word."""
    return str(report.get("verdict") or "UNFINISHED")


def is_ready(report: Document) -> bool:
    """Return whether the checkpoint proved itself."""
    return verdict(report) == "READY"


def tone(report: Document) -> str:
    """Return ``good``, ``cost`` or ``bad``: how the verdict looks, good where the result is."""
    found = quality(report)
    if not is_ready(report):
        return "bad"
    return "good" if found is None else found.tone


def quality_note(report: Document) -> str:
    """Return what was lost beside what is usual; empty where nothing was measured."""
    found = quality(report)
    return "" if found is None else told(found, method_names(report))


def advice(report: Document) -> Sequence[str]:
    """Return what to try where the result is not good."""
    found = quality(report)
    return () if found is None else found.advice


def method_names(report: Document) -> list[str]:
    """Return the methods in the order in which they were applied."""
    steps = rows(section(report, "method"), "steps")
    return [str(step["name"]) for step in steps if step.get("name")]


def keep_fraction(report: Document) -> float | None:
    """Return the true fraction of parameters kept."""
    parameters = section(report, "parameters")
    counted = quotient(parameters.get("after"), parameters.get("before"))
    return number(parameters.get("keep_fraction")) if counted is None else counted


def sentence(report: Document) -> str:
    """Return the result in one sentence."""
    parameters, evaluation = section(report, "parameters"), section(report, "evaluation")
    said = " + ".join(method_names(report)) or "The compressed model"
    said += f" keeps {percent(keep_fraction(report))} of the parameters"
    if number(parameters.get("before")):
        said += f" ({short_count(parameters['after'])} of {short_count(parameters['before'])})"
    dense = section(evaluation, "dense").get("perplexity")
    compressed = section(evaluation, "compressed").get("perplexity")
    ratio = quotient(compressed, dense)
    if ratio is not None:
        said += f"; perplexity goes from {decimal(dense)} to {decimal(compressed)}"
        said += f" ({change(ratio)})"
    speed = _speed(report, "decode_tokens_per_second")
    if speed is not None:
        ranges = speed_ranges(report).get("decode")
        noise = ranges is not None and crosses_one(ranges)
        said += (
            ", and decoding is as fast, within the noise"
            if noise
            else (f", and decoding runs at {times(speed)} the speed")
        )
    return said + "."


def speed_ranges(report: Document) -> dict[str, tuple[float, float]]:
    """Return between which ratios, compressed over dense, the rounds of prefill and decode lie.

    The models take turns, so that what slows the machine down for a while slows both. Empty where
    the rounds are not known.
    """
    rounds = [section(report, "throughput", s).get("rounds") or () for s in ("dense", "compressed")]
    pairs = list(zip(*rounds, strict=False))
    found = {}
    for index, what in enumerate(("prefill", "decode")):
        ratios = [r for before, after in pairs if (r := quotient(after[index], before[index]))]
        if ratios:
            found[what] = (min(ratios), max(ratios))
    return found


def crosses_one(ranges: tuple[float, float]) -> bool:
    """Return whether rounds disagree on which of the two is faster."""
    return ranges[0] < 1.0 < ranges[1]


def comparisons(report: Document) -> tuple[Comparison, ...]:
    """Return the before/after table; measures that neither side has are left out."""
    parameters = section(report, "parameters")
    size = section(report, "bytes")
    evaluation = {side: section(report, "evaluation", side) for side in ("dense", "compressed")}
    speed = {side: section(report, "throughput", side) for side in ("dense", "compressed")}

    def pair(sides: dict[str, Document], key: str) -> tuple[Any, Any]:
        return sides["dense"].get(key), sides["compressed"].get(key)

    found = [
        _compare("Perplexity", pair(evaluation, "perplexity"), decimal, better="less"),
        _compare("Parameters", (parameters.get("before"), parameters.get("after")), count),
        _compare("Checkpoint size", (size.get("before"), size.get("after")), bytes_text),
        _compare(
            "Prefill, tokens/s", pair(speed, "prefill_tokens_per_second"), decimal, better="more"
        ),
        _compare(
            "Decode, tokens/s", pair(speed, "decode_tokens_per_second"), decimal, better="more"
        ),
        _compare("Peak memory", pair(speed, "peak_bytes"), bytes_text),
    ]
    return tuple(row for row in found if row is not None)


def side_by_side(a: Document, b: Document) -> tuple[Comparison, ...]:
    """Return the results of two runs, one in the place of before and the other in that of after.

    Speeds are those relative to each run's own dense model: the runs were timed at other times.
    What neither has is left out.
    """

    def pair(value: Callable[[Document], Any]) -> tuple[Any, Any]:
        return value(a), value(b)

    found = [
        _compare("kept", pair(keep_fraction), percent),
        _compare("parameters", pair(lambda r: section(r, "parameters").get("after")), count),
        _compare("checkpoint", pair(lambda r: section(r, "bytes").get("after")), bytes_text),
        _compare("perplexity", pair(lambda r: _perplexity(r, "compressed")), decimal),
        _compare("  of the dense model", pair(lambda r: _perplexity(r, "dense")), decimal),
        _compare(
            "prefill, to dense", pair(lambda r: _speed(r, "prefill_tokens_per_second")), times
        ),
        _compare("decode, to dense", pair(lambda r: _speed(r, "decode_tokens_per_second")), times),
        _compare("took", pair(lambda r: section(r, "seconds").get("total")), seconds_text),
    ]
    return tuple(row for row in found if row is not None)


def tiles(report: Document) -> tuple[Comparison, ...]:
    """Return the few measures that stand at the top of the page."""
    return tuple(row for row in comparisons(report) if row.name in _TILES)


def asked(report: Document) -> str:
    """Return what was asked for and what that nominally means, beside the true fraction."""
    target = section(report, "target")
    said = []
    if number(target.get("keep_fraction")) is not None:
        said.append(f"asked for {percent(target['keep_fraction'])} of the parameters")
    if number(target.get("slice")) is not None:
        said.append(f"asked for a nominal slice of {percent(target['slice'])} of the width")
    actual = number(target.get("actual_keep_fraction"))
    if actual is None:
        actual = keep_fraction(report)
    if actual is not None:
        said.append(f"kept {percent(actual, digits=2)} of the true parameter count")
    if number(target.get("nominal")) is not None and number(target.get("slice")) is None:
        said.append(f"a nominal slice of {percent(target['nominal'])}")
    text = "; ".join(said)
    return text[:1].upper() + text[1:] + ("." if said else "")


def measured_on(report: Document) -> str:
    """Return what the perplexity was measured on."""
    evaluation = section(report, "evaluation")
    said = []
    if number(evaluation.get("num_tokens")):
        said.append(f"{count(evaluation['num_tokens'])} predicted tokens")
    if number(evaluation.get("sequence_length")):
        said.append(f"in sequences of {count(evaluation['sequence_length'])}, not overlapping")
    if not said:
        return ""
    source = evaluation.get("source")
    return f"Perplexity over {' '.join(said)}" + (f"; source {source}." if source else ".")


def cut_modules(report: Document) -> list[str]:
    """Return the modules that several methods competed for, where one of them cut any."""
    return sorted({module for layer in layers(report) for module in layer.cuts})


def makers_note(report: Document) -> str:
    """Return in how many layers each method shrank a module; empty where one method did all."""
    said = []
    for module in cut_modules(report):
        makers = Counter(layer.cuts.get(module, ("", ""))[0] for layer in layers(report))
        whole = makers.pop("", 0)
        words = [f"{method} in {counted(number, 'layer')}" for method, number in makers.items()]
        said.append(f"{module}: {', '.join(words + [f'whole in {whole}'] * bool(whole))}")
    return f"Of several methods the cheapest was taken. {'; '.join(said)}." if said else ""


def refit_note(report: Document) -> str:
    """Return what the second pass found on held-out sequences; empty where there was none."""
    found = section(report, "refit")
    losses = section(found, "held_out_perplexity")
    if not losses:
        return ""
    after = f"perplexity {decimal(losses.get('refitted'))} instead of "
    after += f"{decimal(losses.get('drafted'))} (dense {decimal(losses.get('dense'))})"
    used = "the refitted layers are used" if found.get("used") else "the layers stand as drafted"
    return f"Refit, on held-out calibration sequences: {after}; {used}."


def statistics_note(report: Document) -> str:
    """Return whose statistics were taken, and for what there were too few tokens, if any."""
    found = section(report, "statistics")
    where = str(found.get("reused_from") or "").partition("?")[0]  # a store's address stays out
    said = [f"Statistics were taken from {where} as far as it had them."] if where else []
    return " ".join(said + [f"Warning: {each}." for each in found.get("few_tokens", ())])


def memory_note(report: Document) -> str:
    """Return which workers took more memory than was planned; empty where none did."""
    memory = section(report, "memory")
    measured = {name: int(peak) for name, peak in section(memory, "workers").items()}
    lines = over_plan(measured, int(memory.get("planned_worker_bytes") or 0))
    return "".join(f"Memory: {line}. " for line in lines).strip()


def throughput_note(report: Document) -> str:
    """Return how the timing was done and how far its rounds agree; empty where nothing is known."""
    return " ".join(part for part in (_how_timed(report), _agreement(report)) if part)


def _how_timed(report: Document) -> str:
    """Return over how many workers models went that do not fit one, or why they were not timed."""
    said = []
    for side in ("dense", "compressed"):
        found = section(report, "throughput", side)
        if found.get("not_measured"):
            said.append(f"The {side} model was not timed: {found['not_measured']}.")
        elif found.get("stages"):
            count = found["stages"]
            workers = f"{count} workers" if count > 1 else "1 worker"
            said.append(f"The {side} model was timed through {workers}, by itself.")
    return " ".join(said)


def _agreement(report: Document) -> str:
    ranges = speed_ranges(report)
    if not ranges:
        return ""
    said = [f"{what} {low:.2f} to {high:.2f}\u00d7" for what, (low, high) in ranges.items()]
    noise = " A range that crosses 1 is noise." if any(map(crosses_one, ranges.values())) else ""
    return f"Speed relative to the dense model, round by round: {', '.join(said)}.{noise}"


def checkpoint_path(report: Document) -> str:
    """Return where the compressed checkpoint lies."""
    folder = str(report.get("out") or "RUN").partition("?")[0]  # a store's address stays out of it
    return f"{folder.rstrip('/')}/model"


def loading_call(report: Document, path: str) -> str:
    """Return the expression that loads the checkpoint; a native one needs no code of its own."""
    native = section(report, "method").get("native") is True
    return f"AutoModelForCausalLM.from_pretrained({path}{'' if native else _REMOTE})"


def loading_code(report: Document) -> str:
    """Return the lines that load and try the compressed checkpoint."""
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"path = {checkpoint_path(report)!r}\n"
        f"model = {loading_call(report, 'path')}\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n\n"
        'inputs = tokenizer("def main", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
    )


def _perplexity(report: Document, side: str) -> Any:
    return section(report, "evaluation", side).get("perplexity")


def _speed(report: Document, key: str) -> float | None:
    dense, compressed = (section(report, "throughput", s) for s in ("dense", "compressed"))
    return quotient(compressed.get(key), dense.get(key)) or None


def _compare(
    name: str, values: tuple[Any, Any], text: Callable[[Any], str], *, better: str = "less"
) -> Comparison | None:
    before, after = values
    if number(before) is None and number(after) is None:
        return None
    short = short_count if text is count else text
    ratio = quotient(after, before)
    gain = 0.0 if ratio is None else (ratio - 1.0) * (1.0 if better == "more" else -1.0)
    tone = "" if abs(gain) < _NOTICEABLE else ("good" if gain > 0.0 else "cost")
    return Comparison(
        name=name,
        before=text(before),
        after=text(after),
        before_short=short(before),
        after_short=short(after),
        change=change(ratio),
        ratio=times(ratio),
        tone=tone,
    )
