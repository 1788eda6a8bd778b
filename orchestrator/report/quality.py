"""Rate a result against what is usual: a rating, its colour, and what to try.

READY means that the files are what was computed and that they load, not that the model is good.
For that the added loss, ``log(perplexity after / before)`` in nats per token, is compared with what
the same method costs when as much is removed. Two models represent the range of sizes:

- from `LARGE` parameters, Llama-2-7B on WikiText-2 as published: MoDeGPT (arXiv:2408.09632) at
  sequences of 4096, SliceGPT (arXiv:2401.15024) at its true fractions and SVD-LLM
  (arXiv:2403.07378; 0.6 and 0.4 are of Llama-1-7B) at 2048;
- below, SmolLM2-135M-Instruct on WikiText-2, measured with this program on 2026-11-26 (calibrated
  on 48 x 1024 tokens, evaluated on 20 x 1024). Small models lose more.

A quantised result is compared with what GPTQ with one number of bits costs at as many bits for each
weight of the input, scales included; that is known of the small model alone (groups of 64).

Between the points the loss is interpolated linearly, from 0 where nothing is removed. Text,
sequence length and model change such numbers, so up to `SLACK` times as much still counts as usual.
A method that is not in the table is compared with the costliest one that is.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.report.document import Document, rows, section
from orchestrator.report.numbers import counted, number, quotient, short_count

LARGE = 1e9  # parameters
TOY = 2e7  # parameters: below, perplexity compares methods but predicts nothing for large models
SLACK = 1.25
CLOSE = 0.05  # nats: within 5 % of the dense model's perplexity
FINE = math.log(1.25)  # nats: MoDeGPT on Llama-2-7B at 0.8 costs less (1.20 times)
BROKEN = math.log(10)  # nats: ten times the perplexity
ENOUGH_TOKENS = 128 * 2048  # as used for calibration in the methods' papers
_STEP = 0.05  # of proposed fractions
_MANY_BITS = 6.0  # of a weight: more are not proposed

# method -> (fraction removed, perplexity before, after)
Points = Sequence[tuple[float, float, float]]
_OF_7B: Mapping[str, Points] = {
    "modegpt": ((0.2, 5.12, 6.16), (0.3, 5.12, 7.51), (0.4, 5.12, 8.41), (0.5, 5.12, 11.88)),
    "slicegpt": ((0.153, 5.47, 7.24), (0.215, 5.47, 8.12), (0.446, 5.47, 17.17)),
    "svdllm": ((0.2, 5.47, 8.50), (0.4, 5.68, 13.73), (0.6, 5.68, 66.62)),
}
_OF_135M: Mapping[str, Points] = {
    "modegpt": ((0.1, 26.30, 31.14), (0.2, 26.30, 37.45), (0.3, 26.30, 48.99)),
    "slicegpt": ((0.201, 26.30, 164.8),),
    "svdllm": ((0.201, 26.30, 92.07),),
    "basis_sharing": ((0.201, 26.30, 97.48),),
    "deltallm": ((0.2, 26.30, 63.59),),
}
_FULL_BITS = 16.0
# Bits that are saved of 16 take the place of the fraction removed.
_QUANTISED: Points = ((1 - 4.25 / _FULL_BITS, 26.30, 28.94), (1 - 3.25 / _FULL_BITS, 26.30, 42.23))


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The loss of a result, and its rating.

    Attributes:
        word: ``close to the dense model``, ``usual for this size``, ``worse than usual`` or
            ``broken``.
        excess_nats: log(perplexity after / before) per token; None if a perplexity is infinite.
        usual_nats: usual for the method, with as much removed, at that size of model.
        compared_with: the model that the usual loss is known of.
        tone: ``good``, ``cost`` or ``bad``.
        toy: the model is so small that its perplexity predicts nothing for large ones.
        advice: what to try, command-line options with a reason; empty if the result is good.
    """

    word: str
    excess_nats: float | None
    usual_nats: float
    compared_with: str
    tone: str
    toy: bool
    advice: Sequence[str] = field(default_factory=list)


def judged(
    before: float,
    after: float,
    *,
    kept: float,
    parameters: float,
    names: Sequence[str],
    bits: float | None = None,
) -> Quality:
    """Return the rating of a result.

    Args:
        before: perplexity of the dense model.
        after: of the result.
        kept: true fraction of the parameters that is left.
        parameters: of the dense model.
        names: of the methods.
        bits: for each weight of the input's linears, if the result is quantised.
    """
    is_large = parameters >= LARGE and bits is None
    table = _OF_7B if is_large else _OF_135M
    curves = [table[name] for name in names if name in table] or list(table.values())
    usual = max(_expected(curve, 1 - kept) for curve in curves)
    if bits is not None:
        usual = _expected(_QUANTISED, max(0.0, 1 - bits / _FULL_BITS))
    excess = math.log(after / before) if before > 0 and 0 < after < math.inf else math.inf
    if excess >= BROKEN:
        word, tone = "broken", "bad"
    elif excess <= CLOSE:
        word, tone = "close to the dense model", "good"
    elif excess <= SLACK * usual:
        word, tone = "usual for this size", "good" if excess <= FINE else "cost"
    else:
        word, tone = "worse than usual", "cost"
    return Quality(
        word=word,
        excess_nats=excess if math.isfinite(excess) else None,
        usual_nats=usual,
        compared_with="Llama-2-7B, published" if is_large else "SmolLM2-135M, measured",
        tone=tone,
        toy=parameters < TOY,
    )


def quality(report: Document) -> Quality | None:
    """Return the rating of a report's result; None if it was not measured."""
    parameters, evaluation = section(report, "parameters"), section(report, "evaluation")
    sides = [section(evaluation, side).get("perplexity") for side in ("dense", "compressed")]
    kept = quotient(parameters.get("after"), parameters.get("before"))
    if kept is None or None in sides:
        return None
    before, after = (math.inf if number(s) is None else number(s) or 0.0 for s in sides)
    steps = rows(section(report, "method"), "steps")
    found = judged(
        before,
        after,
        kept=kept,
        parameters=number(parameters.get("before")) or 0.0,
        names=[str(step.get("name")) for step in steps],
        bits=bits_of_input(report),
    )
    if found.tone == "good":
        return found
    return replace(found, advice=list(_advice(report, steps, kept)))


def bits_of_input(report: Document) -> float | None:
    """Return the bits of a quantised result for each weight of the input's linears, or None."""
    found = section(report, "storage")
    return number(section(found, "bits").get("of_input")) if found.get("quantised") else None


def quality_text(found: Quality, names: Sequence[str]) -> str:
    """Return in a sentence how much was lost, and how much is usual."""
    if found.excess_nats is None:
        return "Quality: broken; the perplexity of the result is not finite."
    of = f"{' + '.join(names) or 'such a method'} at this size"
    word = found.word.replace("this size", of)
    if found.word == "usual for this size" and found.tone == "cost":
        word += ", but far from the dense model"
    text = f"Quality: {word}. It lost {found.excess_nats:.2f} nats per token; "
    text += f"{found.usual_nats:.2f} are usual ({found.compared_with})."
    return text + (" A model this small can only compare methods." if found.toy else "")


def _expected(curve: Points, removed: float) -> float:
    """Return the nats by linear interpolation from no loss, extrapolated after the last point."""
    points = [(0.0, 0.0), *((x, math.log(after / before)) for x, before, after in curve)]
    ends = next((i for i in range(1, len(points)) if removed <= points[i][0]), len(points) - 1)
    (left, low), (right, high) = points[ends - 1 : ends + 1]
    return max(0.0, low + (high - low) * (removed - left) / (right - left))


def _advice(report: Document, steps: Sequence[Document], kept: float) -> Iterator[str]:
    """Yield up to four things to try that this run has not done, the most helpful first."""
    bits = bits_of_input(report)
    if bits is not None:
        yield from _advice_on_bits(report, steps, bits)
        return
    more = min(0.95, max(_STEP, _STEP * math.floor((1 + kept) / 2 / _STEP + 1e-9)))
    larger = f"a larger size: --keep-fraction {more:g}" if more > kept else ""
    training = _training_advice(report)
    if len(steps) != 1:
        yield from ([training] if training else [])
        yield "larger fractions in --step, starting with the last step"
        return
    first, *others = [*_method_advice(steps[0], kept), ""]
    advice = [first, training, *others, _data_advice(report)]
    yield from [text for text in advice if text][: 3 if larger else 4]
    if larger:
        yield larger


def _advice_on_bits(report: Document, steps: Sequence[Document], bits: float) -> Iterator[str]:
    """Yield what to try for a quantised result."""
    options = section(steps[-1], "options") if steps else {}
    if options.get("rounding") == "nearest":
        yield "--option rounding=gptq: errors of rounding cancel"
    if options.get("refit") is False:
        yield "--option refit=true: layer after layer is rounded again, correcting those before it"
    if text := _data_advice(report):
        yield text
    if bits < _MANY_BITS:
        yield f"a larger size: --bits {math.ceil(2 * bits + _STEP) / 2:g}"


def _method_advice(step: Document, kept: float) -> Iterator[str]:
    options = section(step, "options")
    if step.get("name") != "modegpt":
        yield f"--method modegpt --keep-fraction {kept:.2f}: it loses the least of all methods"
        return
    if options.get("allocation") != "marginal":
        yield "--option allocation=marginal: widths by the cost of each cut"
    elif not options.get("candidates") and options.get("servable") != "native":
        yield "--option candidates=modegpt,svdllm: the better of two methods for each module"
    if options.get("refit") is False:
        yield "--option refit=true: a second pass, used where it helps on held-out text"


def _training_advice(report: Document) -> str:
    """Return that the result can be trained; empty if it was."""
    if section(report, "recovery"):
        return ""
    parameters = number(section(report, "parameters").get("before")) or 0.0
    used = "used where it helps on held-out text"
    if parameters < LARGE:
        return f"--recover global: trains the result on the logits of the dense model, {used}"
    return f"--recover local: trains each layer on the output of the dense one, {used}"


def _data_advice(report: Document) -> str:
    found = section(report, "recipe", "calibration")
    sequences, length = (number(found.get(key)) for key in ("sequences", "sequence_length"))
    if not sequences or not length or sequences * length >= ENOUGH_TOKENS:
        return ""
    enough = counted(math.ceil(ENOUGH_TOKENS / length), "sequence")
    used = f"{short_count(sequences * length)} tokens were used"
    return f"more calibration data: {used}; the papers use {short_count(ENOUGH_TOKENS)}, {enough}"
