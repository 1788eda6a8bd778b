"""The result of a run in one sentence and one table, for both the page and the terminal."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.report import bits, speed
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
from orchestrator.report.quality import quality, quality_text
from planners.timing import EAGER

_NOTICEABLE = 0.005
_REMOTE = ", trust_remote_code=True"
_TILES = ("Perplexity", "Parameters", "Checkpoint size")
_QUANTISED_TILES = ("Perplexity", "Weights", "Bits a weight")
_TONE_OF = {speed.FASTER: "good", speed.SLOWER: "cost", speed.NOISE: ""}


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
    """Return the title of a report: the model and its methods."""
    given = report.get("title")
    if given:
        return str(given)
    model = section(report, "model").get("source") or "model"
    return " \u00b7 ".join([str(model), *method_names(report)])


def verdict(report: Document) -> str:
    """Return the verdict word."""
    return str(report.get("verdict") or "UNFINISHED")


def is_ready(report: Document) -> bool:
    """Return whether the checkpoint has passed verification."""
    return verdict(report) == "READY"


def tone(report: Document) -> str:
    """Return ``good``, ``cost`` or ``bad``, the tone in which the verdict is shown."""
    found = quality(report)
    if not is_ready(report):
        return "bad"
    return "good" if found is None else found.tone


def quality_note(report: Document) -> str:
    """Return the loss in quality compared with what is usual; empty if not measured."""
    found = quality(report)
    return "" if found is None else quality_text(found, method_names(report))


def advice(report: Document) -> Sequence[str]:
    """Return what to try if the result is not good."""
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
    text = " + ".join(method_names(report)) or "The compressed model"
    if bits.is_quantised(report):
        text += _stores(report)
    else:
        text += f" keeps {percent(keep_fraction(report))} of the parameters"
        if number(parameters.get("before")):
            text += f" ({short_count(parameters['after'])} of {short_count(parameters['before'])})"
    dense = section(evaluation, "dense").get("perplexity")
    compressed = section(evaluation, "compressed").get("perplexity")
    ratio = quotient(compressed, dense)
    if ratio is not None:
        text += f"; perplexity goes from {decimal(dense)} to {decimal(compressed)}"
        text += f" ({change(ratio)})"
    speeds = speed.sentence(_main_speeds(report))
    return text + (f"; {speeds}" if speeds else "") + "."


def _stores(report: Document) -> str:
    """Return the bytes and bits of a quantised result, and what it keeps if it was cut, too."""
    found = section(report, "storage")
    before, after, kept = found["before"], found["after"], keep_fraction(report)
    text = f" stores the weights in {bytes_text(after)} instead of {bytes_text(before)}"
    text += f" ({percent(quotient(after, before))})"
    text += f", {decimal(section(found, 'bits').get('after'))} bits a weight"
    # More than all: a tied table that is quantised is stored twice.
    is_cut = kept is not None and kept < 1
    return text + (f", with {percent(kept)} of the parameters" if is_cut else "")


def slower(report: Document) -> str:
    """Return at what the result is slower than the dense model; empty if at nothing."""
    return speed.headline(speed.speeds(report))


def slower_because(report: Document) -> list[str]:
    """Return why the result is slower, as far as is known."""
    return speed.reasons(speed.speeds(report), *_timed(report))


def _main_speeds(report: Document) -> tuple[speed.Speed, ...]:
    return speed.main(speed.speeds(report), section(report, "throughput", "dense"))


def _timed(report: Document) -> tuple[Document, Document]:
    return section(report, "throughput", "dense"), section(report, "throughput", "compressed")


def comparisons(report: Document) -> tuple[Comparison, ...]:
    """Return the before/after table, without measures that neither side has."""
    parameters, storage = section(report, "parameters"), section(report, "storage")
    size, is_quantised = section(report, "bytes"), bits.is_quantised(report)
    evaluation = {side: section(report, "evaluation", side) for side in ("dense", "compressed")}
    timed = {side: section(report, "throughput", side) for side in ("dense", "compressed")}

    def pair(sides: dict[str, Document], key: str) -> tuple[Any, Any]:
        return sides["dense"].get(key), sides["compressed"].get(key)

    found = [
        _compare("Perplexity", pair(evaluation, "perplexity"), decimal),
        *(_stored_rows(storage) if is_quantised else ()),
        None
        if is_quantised and (keep_fraction(report) or 1) >= 1
        else _compare("Parameters", (parameters.get("before"), parameters.get("after")), count),
        _compare("Checkpoint size", (size.get("before"), size.get("after")), bytes_text),
        *(_speed_row(each) for each in speed.speeds(report)),
        _compare("Peak memory", pair(timed, "peak_bytes"), bytes_text),
    ]
    return tuple(row for row in found if row is not None)


def _stored_rows(storage: Document) -> list[Comparison | None]:
    a_weight = section(storage, "bits")
    return [
        _compare("Weights", (storage.get("before"), storage.get("after")), bytes_text),
        _compare("Bits a weight", (a_weight.get("before"), a_weight.get("after")), decimal),
    ]


def side_by_side(a: Document, b: Document) -> tuple[Comparison, ...]:
    """Return the results of two runs, the first as before and the second as after.

    Speeds are relative to each run's own dense model, as the runs were timed at different times.
    Measures that neither run has are left out.
    """

    def pair(value: Callable[[Document], Any]) -> tuple[Any, Any]:
        return value(a), value(b)

    found = [
        _compare("kept", pair(keep_fraction), percent),
        _compare("parameters", pair(lambda r: section(r, "parameters").get("after")), count),
        _compare("weights", pair(lambda r: section(r, "storage").get("after")), bytes_text),
        _compare(
            "bits a weight", pair(lambda r: section(r, "storage", "bits").get("after")), decimal
        ),
        _compare("checkpoint", pair(lambda r: section(r, "bytes").get("after")), bytes_text),
        _compare("perplexity", pair(lambda r: _perplexity(r, "compressed")), decimal),
        _compare("  of the dense model", pair(lambda r: _perplexity(r, "dense")), decimal),
        _compare(
            "prefill, to dense",
            pair(lambda r: _ratio(r, "prefill")),
            times,
            better="more",
        ),
        _compare(
            "decode, to dense",
            pair(lambda r: _ratio(r, "decode")),
            times,
            better="more",
        ),
        _compare("took", pair(lambda r: section(r, "seconds").get("total")), seconds_text),
    ]
    return tuple(row for row in found if row is not None)


def tiles(report: Document) -> tuple[Comparison, ...]:
    """Return the measures shown at the top of the page."""
    decode = [
        replace(_speed_row(each), name="Decode, tokens/s")
        for each in _main_speeds(report)
        if each.part == "decode"
    ]
    names = _QUANTISED_TILES if bits.is_quantised(report) else _TILES
    return (*(row for row in comparisons(report) if row.name in names), *decode)


def asked(report: Document) -> str:
    """Return the requested size and its nominal meaning, with the true fraction."""
    target = section(report, "target")
    parts = []
    if number(target.get("keep_fraction")) is not None:
        parts.append(f"requested {percent(target['keep_fraction'])} of the parameters")
    if number(target.get("slice")) is not None:
        parts.append(f"requested a nominal slice of {percent(target['slice'])} of the width")
    if number(target.get("keep_bytes")) is not None:
        stored = section(report, "storage").get("after")
        parts.append(
            f"requested at most {count(target['keep_bytes'])} bytes of weights; they take "
            f"{count(stored)}"
        )
    if number(target.get("bits")) is not None:
        mean = section(report, "storage", "bits").get("of_input")
        parts.append(
            f"requested {target['bits']:g} bits for each weight of the input's linears; they take "
            f"{decimal(mean)}"
        )
    actual = number(target.get("actual_keep_fraction"))
    if actual is None:
        actual = keep_fraction(report)
    if actual is not None and not (actual >= 1 and bits.is_quantised(report)):
        parts.append(f"kept {percent(actual, digits=2)} of the true parameter count")
    if number(target.get("nominal")) is not None and number(target.get("slice")) is None:
        parts.append(f"a nominal slice of {percent(target['nominal'])}")
    text = "; ".join(parts)
    return text[:1].upper() + text[1:] + ("." if parts else "")


def promise(report: Document) -> str:
    """Return a speed or a memory that was asked for beside what was reached; empty if none was."""
    found = section(report, "target", "promise")
    if not found:
        return ""
    load = f"batch {found['batch']}, context {count(found['context'])}"
    if found["of"] == "fit":
        return (
            f"Asked to fit {bytes_text(found['asked'])}; weights, keys and values ({load}) and "
            f"workspace take {bytes_text(found['promised'])}."
        )
    part = f"{found['phase']} at {load}"
    said = f"Asked for {times(found['asked'])} the speed of {part}; promised from the times of "
    said += f"single layers {times(found['promised'])}"
    measured = next(
        (
            each
            for each in speed.speeds(report)
            if (each.part, each.batch, each.mode) == (found["phase"], found["batch"], EAGER)
        ),
        None,
    )
    if measured is None:
        return f"{said}, not measured."
    return f"{said}, measured {times(measured.ratio)} ({measured.interval})."


def served(report: Document) -> str:
    """Return the form of the result and what others would have cost; empty if none was compared."""
    found = section(report, "method", "served")
    damages = section(found, "damages")
    chosen, rest = found.get("as"), {k: v for k, v in damages.items() if k != found.get("as")}
    if not chosen or not rest:
        return ""
    ratios = {k: quotient(v, damages[chosen]) for k, v in rest.items()}
    others = ", ".join(f"{name} {times(ratio)}" for name, ratio in ratios.items())
    form = (
        "widths are free, which needs our modelling file"
        if chosen == "remote"
        else "a stock config describes it"
    )
    return f"Form: {chosen}: {form}. Predicted damage of the others, to this: {others}."


def measured_on(report: Document) -> str:
    """Return what the perplexity was measured on."""
    evaluation = section(report, "evaluation")
    parts = []
    if number(evaluation.get("num_tokens")):
        parts.append(f"{count(evaluation['num_tokens'])} predicted tokens")
    if number(evaluation.get("sequence_length")):
        parts.append(f"in sequences of {count(evaluation['sequence_length'])}, not overlapping")
    if parts and evaluation.get("dtype"):
        parts[-1] += f", computed in {evaluation['dtype']}"
    if not parts:
        return ""
    source = evaluation.get("source")
    return f"Perplexity over {' '.join(parts)}" + (f"; source {source}." if source else ".")


def cut_modules(report: Document) -> list[str]:
    """Return the modules that several methods competed for and that were cut."""
    return sorted({module for layer in layers(report) for module in layer.cuts})


def makers_note(report: Document) -> str:
    """Return in how many layers each method shrank a module; empty if there was one method."""
    parts = []
    for module in cut_modules(report):
        makers = Counter(layer.cuts.get(module, ("", ""))[0] for layer in layers(report))
        uncut = makers.pop("", 0)
        counts = [f"{method} in {counted(number, 'layer')}" for method, number in makers.items()]
        parts.append(f"{module}: {', '.join(counts + [f'uncut in {uncut}'] * bool(uncut))}")
    if not parts:
        return ""
    return f"Each module was cut by the method that costs least. {'; '.join(parts)}."


def refit_note(report: Document) -> str:
    """Return the result of the refit on held-out sequences; empty if there was no refit."""
    found = section(report, "refit")
    losses = section(found, "held_out_perplexity")
    if not losses:
        return ""
    after = f"perplexity {decimal(losses.get('refitted'))} instead of "
    after += f"{decimal(losses.get('drafted'))} (dense {decimal(losses.get('dense'))})"
    used = "the refitted layers are used" if found.get("used") else "the drafted layers are kept"
    return f"Refit, on held-out calibration sequences: {after}; {used}."


def statistics_note(report: Document) -> str:
    """Return whose statistics were reused, and which had too few tokens, if any."""
    found = section(report, "statistics")
    where = str(found.get("reused_from") or "").partition("?")[0]  # without the store's address
    notes = [f"Statistics were reused from {where} where available."] if where else []
    return " ".join(notes + [f"Warning: {each}." for each in found.get("few_tokens", ())])


def memory_note(report: Document) -> str:
    """Return which workers used more memory than planned; empty if none did."""
    memory = section(report, "memory")
    measured = {name: int(peak) for name, peak in section(memory, "workers").items()}
    lines = over_plan(measured, int(memory.get("planned_worker_bytes") or 0))
    return "".join(f"Memory: {line}. " for line in lines).strip()


def throughput_note(report: Document) -> str:
    """Return how the models were timed and how far the rounds agree; empty if not known."""
    parts = (_how_timed(report), speed.agreement(speed.speeds(report)))
    return " ".join(part for part in parts if part)


def _how_timed(report: Document) -> str:
    """Return what was timed, over how many workers if over several, or why it was not."""
    notes = []
    dense, compressed = _timed(report)
    if dense.get("prompt"):
        notes.append(
            f"Timed with prompts of {dense['prompt']} tokens and {dense['new_tokens']} new ones."
        )
    for side, found in (("dense", dense), ("compressed", compressed)):
        if found.get("stages"):
            workers = counted(found["stages"], "worker")
            notes.append(f"The {side} model was timed over {workers}, on its own.")
        notes += [
            f"The {side} model was not timed at batch {row['batch']} ({row['mode']}): "
            f"{row['not_measured']}."
            for row in rows(found, "settings")
            if "not_measured" in row
        ]
    return " ".join(notes)


def kernels_note(report: Document) -> str:
    """Return which kernels computed attention, and what kept others away; empty if not known."""
    dense, compressed = _timed(report)
    sides = [f"{side}: {said}" for side, found in (("dense", dense), ("compressed", compressed))
             if (said := speed.kernels_text(found))]  # fmt: skip
    if not sides:
        return ""
    warnings = [*speed.refused_kernels(dense, compressed), *speed.uneven_widths(compressed)]
    text = f"Attention kernels, by widths of q/k and v/o heads: {'. '.join(sides)}."
    return " ".join([text, *(f"Warning: {each}." for each in warnings)])


def checkpoint_path(report: Document) -> str:
    """Return the path of the compressed checkpoint."""
    folder = str(report.get("out") or "RUN").partition("?")[0]  # without the store's address
    return f"{folder.rstrip('/')}/model"


def loading_call(report: Document, path: str) -> str:
    """Return the expression that loads the checkpoint; a native one needs no custom code."""
    native = section(report, "method").get("native") is True
    return f"AutoModelForCausalLM.from_pretrained({path}{'' if native else _REMOTE})"


def loads_with(report: Document) -> tuple[str, ...]:
    """Return the packages that load a result, as they are called where they are installed."""
    return ("transformers", *(("compressed-tensors",) if bits.is_quantised(report) else ()))


def loading_code(report: Document) -> str:
    """Return the lines that load and try the compressed checkpoint."""
    needs = "# pip install compressed-tensors\n" if bits.is_quantised(report) else ""
    return (
        f"{needs}"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"path = {checkpoint_path(report)!r}\n"
        f"model = {loading_call(report, 'path')}\n"
        "tokenizer = AutoTokenizer.from_pretrained(path)\n\n"
        'inputs = tokenizer("def main", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
    )


def _perplexity(report: Document, side: str) -> Any:
    return section(report, "evaluation", side).get("perplexity")


def _ratio(report: Document, part: str) -> float | None:
    return next((each.ratio for each in _main_speeds(report) if each.part == part), None)


def _speed_row(found: speed.Speed) -> Comparison:
    return Comparison(
        name=f"{found.part.capitalize()} tokens/s, {found.setting}",
        before=decimal(found.before),
        after=decimal(found.after),
        before_short=decimal(found.before),
        after_short=decimal(found.after),
        change=found.said,
        ratio=found.interval,
        tone=_TONE_OF[found.verdict],
    )


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
