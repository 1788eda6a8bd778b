"""Which of two models is faster, at what, and why the compressed one is slower.

Every table and sentence about speed is made from `compared`, so that none says what another denies.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.report.document import Document, rows, section
from orchestrator.report.numbers import counted, number, percent
from planners.timing import EAGER, median_interval

FASTER, SLOWER, NOISE = "faster", "slower", "too noisy to say"
PARTS = ("prefill", "decode")
_HALF = ("bfloat16", "float16")
_UNFUSED = "math"
_SHOWN_WIDTHS = 3
_FEW_OF_LAYERS = 0.25  # of all removed parameters
_CALL_BOUND = 1e8  # parameters, on a CPU
_SMALL_BATCH = 16  # sequences: up to here a second factor costs a launch and saves little


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Two models at one part of generation, in one setting.

    Attributes:
        part: ``prefill`` or ``decode``.
        batch: sequences at one time.
        mode: ``eager``, or what compiles the step.
        before: tokens per second of the first model; ``after`` of the second.
        ratio: median of the ratios of the rounds, second over first.
        low: of the interval that holds the true median; ``high`` its other end.
        verdict: of the second model: `FASTER`, `SLOWER`, or `NOISE` if the interval holds 1.
    """

    part: str
    batch: int
    mode: str
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str

    @property
    def setting(self) -> str:
        """The batch, and the mode unless it is eager."""
        return f"batch {self.batch}" + ("" if self.mode == EAGER else f" ({self.mode})")

    @property
    def said(self) -> str:
        """The verdict with its number."""
        if self.verdict == NOISE:
            return NOISE
        return f"{self.ratio:.2f}\u00d7, {self.verdict}"

    @property
    def interval(self) -> str:
        """The interval of the ratio."""
        if self.low <= 0:
            return "too few rounds"
        return f"{self.low:.2f} to {self.high:.2f}\u00d7"


def compared(before: Document, after: Document) -> tuple[Speed, ...]:
    """Return the comparison of two models in all settings in which both were timed.

    Args:
        before: what was measured of the first model: an entry of ``throughput``.
        after: of the second one.
    """
    known = {(row["batch"], row["mode"]): row for row in rows(after, "settings")}
    return tuple(
        found
        for row in rows(before, "settings")
        for other in [known.get((row["batch"], row["mode"]), {})]
        for part in PARTS
        if (found := _speed(part, row, other)) is not None
    )


def speeds(report: Document) -> tuple[Speed, ...]:
    """Return the comparison of the input model and the result of a run."""
    return compared(*(section(report, "throughput", side) for side in ("dense", "compressed")))


def main(found: Sequence[Speed], model: Document) -> tuple[Speed, ...]:
    """Return the comparisons of the main setting of a model."""
    return tuple(
        s for s in found if (s.batch, s.mode) == (model.get("batch"), model.get("mode", EAGER))
    )


def headline(found: Sequence[Speed]) -> str:
    """Return at what the second model is slower, for a first line; empty if at nothing."""
    parts = [_listed(part, [s for s in found if s.part == part]) for part in PARTS]
    slower = [each for each in parts if each]
    return f"slower than the dense model in {' and '.join(slower)}" if slower else ""


def sentence(found: Sequence[Speed]) -> str:
    """Return the verdicts of one setting in a clause; empty if there are none."""
    said = [
        f"{s.part} {s.verdict}" + ("" if s.verdict == NOISE else f" ({s.ratio:.2f}\u00d7)")
        for s in found
    ]
    if found and all(s.verdict == NOISE for s in found):
        said = [f"{' and '.join(s.part for s in found)} {NOISE}"]
    return f"at {found[0].setting} {', '.join(said)}" if said else ""


def agreement(found: Sequence[Speed]) -> str:
    """Return how far the rounds agree; empty if nothing was compared."""
    if not found:
        return ""
    parts = [f"{s.part} at {s.setting} {s.interval}" for s in found]
    text = f"Speed relative to the dense model, 95 % intervals of the median: {'; '.join(parts)}."
    noise = any(s.verdict == NOISE for s in found)
    return text + (" An interval that holds 1 is too noisy to say." if noise else "")


def reasons(found: Sequence[Speed], before: Document, after: Document) -> list[str]:
    """Return why the second model is slower, as far as is known; empty if it is not.

    Args:
        found: the comparison.
        before: what was measured of the first model, with its ``facts``.
        after: of the second one.
    """
    slower = {s.part for s in found if s.verdict == SLOWER}
    if not slower:
        return []
    batches = [s.batch for s in found if s.verdict == SLOWER]
    facts, dense = section(after, "facts"), section(before, "facts")
    on_gpu = after.get("device") == "cuda"
    known = [*refused_kernels(before, after, slower), *uneven_widths(after)]
    if facts.get("low_rank") and min(batches) <= _SMALL_BATCH:
        linears = counted(int(facts["low_rank"]), "linear")
        known.append(f"{linears} of low rank: two products each, which costs at small batches")
    if facts.get("changed"):
        linears = counted(int(facts["changed"]), "linear")
        known.append(
            f"{linears} multiply by the matrix of another layer, which is stored once, and by "
            "their own factors: that saves bytes, not time"
        )
    if facts.get("shortcuts"):
        layers = counted(int(facts["shortcuts"]), "layer")
        known.append(f"shortcuts: {layers} multiply the residual stream by matrices")
    removed, of_layers = (_removed(dense, facts, key) for key in ("parameters", "layer_parameters"))
    if removed > 0 and of_layers < _FEW_OF_LAYERS * removed:
        known.append(
            f"{percent(1 - max(0.0, of_layers) / removed, digits=0)} of what was removed is in the "
            "embedding or the head, and not in the layers"
        )
    if not on_gpu and (number(facts.get("parameters")) or 0) < _CALL_BOUND:
        known.append("on a CPU the calls of a model this small take longer than its products")
    return known


def _removed(before: Document, after: Document, key: str) -> float:
    return (number(before.get(key)) or 0.0) - (number(after.get(key)) or 0.0)


def refused_kernels(before: Document, after: Document, parts: Collection[str] = PARTS) -> list[str]:
    """Return where a result's heads got no fused attention kernel although dense ones do.

    On a CPU a single query is as fast without one.
    """
    dense, own = section(before, "kernels"), section(after, "kernels")
    heads = section(after, "facts").get("heads") or []
    found = []
    for part in PARTS if after.get("device") == "cuda" else PARTS[:1]:
        kernels = own.get(part) or []
        fused = [name for name in dense.get(part) or [] if name != _UNFUSED]
        if part not in parts or not fused or len(kernels) != len(heads):
            continue
        layers = defaultdict(list)
        for index, (name, widths) in enumerate(zip(kernels, heads, strict=True)):
            if name == _UNFUSED:
                layers[tuple(widths)].append(index)
        found += [
            f"{part} in {layers_text(where)}: heads of width {qk} (q/k) and {vo} (v/o) get no "
            f"fused attention kernel; the dense model gets {fused[0]}"
            for (qk, vo), where in layers.items()
        ]
    return found


def uneven_widths(model: Document) -> list[str]:
    """Return the widths that are no multiples of 8, for a model in 16 bits on a GPU."""
    facts = section(model, "facts")
    if model.get("device") != "cuda" or facts.get("dtype") not in _HALF:
        return []
    uneven = rows(facts, "uneven")
    if not uneven:
        return []
    each = [f"{row['what']} {row['width']} in {layers_text(row['layers'])}" for row in uneven]
    more = len(each) - _SHOWN_WIDTHS
    text = "; ".join(each[:_SHOWN_WIDTHS]) + (f"; and {more} more" if more > 0 else "")
    return [f"widths that are not multiples of 8, for which a GPU has slow kernels: {text}"]


def kernels_text(model: Document) -> str:
    """Return which kernels computed the attention of a model, by widths of heads."""
    heads = section(model, "facts").get("heads") or []
    own = section(model, "kernels")
    each = defaultdict(list)
    for part in PARTS:
        kernels = own.get(part) or []
        if len(kernels) != len(heads):
            return ""
        pairs = zip(kernels, heads, strict=True)
        for name, (qk, vo) in dict.fromkeys((name, tuple(pair)) for name, pair in pairs):
            each[part, name].append(f"{qk}/{vo}")
    said = [f"{part} {name} ({', '.join(widths)})" for (part, name), widths in each.items()]
    return "; ".join(said)


def layers_text(layers: Sequence[int]) -> str:
    """Return layers with their numbers, runs of them as ranges."""
    return ("layer " if len(layers) == 1 else "layers ") + ", ".join(_ranges(layers))


def _ranges(layers: Sequence[int]) -> Iterator[str]:
    ends = [i for i, (a, b) in enumerate(pairwise(layers)) if b != a + 1]
    starts = [0, *(i + 1 for i in ends)]
    for start, end in zip(starts, [*ends, len(layers) - 1], strict=True):
        first, last = layers[start], layers[end]
        yield str(first) if first == last else f"{first}-{last}"


def _speed(part: str, row: Document, other: Document) -> Speed | None:
    key, index = f"{part}_tokens_per_second", PARTS.index(part)
    before, after = number(row.get(key)), number(other.get(key))
    if not before or not after:
        return None
    pairs = zip(row["rounds"], other["rounds"], strict=False)
    ratios = sorted(b[index] / a[index] for a, b in pairs)
    ratio = (ratios[len(ratios) // 2] + ratios[(len(ratios) - 1) // 2]) / 2
    low, high = median_interval(ratios)
    verdict = FASTER if low > 1 else SLOWER if high < 1 else NOISE
    return Speed(
        part=part, batch=row["batch"], mode=row["mode"], before=before, after=after,
        ratio=ratio, low=low, high=high, verdict=verdict,
    )  # fmt: skip


def _listed(part: str, found: Sequence[Speed]) -> str:
    """Return a part with the settings in which it is slower; empty if in none."""
    slower = [s.setting for s in found if s.verdict == SLOWER]
    if not slower or len(slower) == len(found):
        return part if slower else ""
    return f"{part} at {', '.join(slower)}"
