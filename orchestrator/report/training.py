"""What the recovery of a result brought: a note, the curve of its losses, and errors by layer."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.report.document import Document, rows, section
from orchestrator.report.numbers import (
    MISSING,
    change,
    count,
    counted,
    decimal,
    number,
    percent,
    quotient,
    short_tick,
)
from orchestrator.report.sparkline import averaged
from orchestrator.report.svg import (
    BEFORE,
    CUT,
    KEPT,
    Plot,
    Point,
    Sheet,
    Words,
    draw,
    is_wide,
    number_axis,
    span_axis,
    ticks,
    value_axis,
)

MAX_POINTS = 240  # of the training loss: more are averaged
_BAR, _INNER = 0.72, 0.45
_MANY = 40  # layers: from here on both bars are of one width
_DATA = {"calibration": "the calibration data", "self": "text that the dense model wrote"}
_TRAINS = {"all": ", all tensors of the layers", "lora": ", low-rank changes of its linears"}
_LOSSES = {"kl": "divergence from the dense model", "labels": "cross-entropy of the text"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """The numbers behind a plot.

    Attributes:
        columns: names; the first heads the rows.
        rows: texts, one for each column.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTraining:
    """The held-out error of one layer before and after it was trained alone.

    Attributes:
        before: squared, relative to the square of the dense output; None if nothing was trained.
        after: likewise.
        rate: that was used.
        kept: the trained values were better.
    """

    index: int
    before: float | None
    after: float | None
    rate: float | None
    kept: bool


def recovery_note(report: Document) -> str:
    """Return how the result was trained and what that brought; empty if it was not."""
    found = section(report, "recovery")
    if not found:
        return ""
    text = f"Recovery, {found.get('mode')}"
    text += ", on the text itself" if found.get("loss") == "labels" else ""
    text += _TRAINS.get(str(found.get("trains")), "")
    text += f", on {count(found.get('tokens'))} tokens of {_data(found)}{_rates(found)}: "
    blocks = layers(report)
    if blocks:
        better = sum(layer.kept for layer in blocks)
        text += f"error lower in {better} of {counted(len(blocks), 'layer')}; "
    losses = section(found, "held_out_perplexity")
    text += f"held-out perplexity {_perplexity(losses, 'after')} instead of "
    text += _perplexity(losses, "before")
    if found.get("used"):
        text += "; the trained model is used."
    else:
        text += ", no better, so the model is as it was before."
    nothing = [str(name) for name in found.get("nothing") or ()]
    return text + (f" Nothing local to learn in {_listed(nothing)}." if nothing else "")


def layers(report: Document) -> tuple[LayerTraining, ...]:
    """Return the layers that were trained alone, in order."""
    found = [
        LayerTraining(
            index=int(row.get("layer", position)),
            before=number(row.get("before")),
            after=number(row.get("after")),
            rate=number(row.get("rate")),
            kept=row.get("kept") is True,
        )
        for position, row in enumerate(rows(section(report, "recovery"), "layers"))
    ]
    return tuple(sorted(found, key=lambda layer: layer.index))


def curve(report: Document) -> Plot | None:
    """Return a plot of the losses of a training of the whole model; None if there was none."""
    found = section(report, "recovery")
    losses, held_out = _points(found, "curve"), _points(found, "held_out_curve")
    if not losses or not held_out:
        return None
    best_at, best = min(held_out, key=lambda point: point[1])
    what = _LOSSES.get(str(found.get("loss")), "loss")
    group = -(-len(losses) // MAX_POINTS)
    scale = ", on a logarithmic scale" if is_wide([y for _, y in (*losses, *held_out)]) else ""
    means = f" A point of the training loss is the mean of {group} steps." if group > 1 else ""
    is_early = best_at < held_out[-1][0]
    taken = (
        f"The weights with the lowest held-out loss{', at the dashed line,' * is_early} are taken: "
    )
    taken += f"{decimal(best)}, from {decimal(held_out[0][1])}."
    if best_at == 0:
        taken = "No held-out loss is below that before the training, so its weights stay."
    words = Words(
        key="training",
        title="Loss of the training",
        description=f"The held-out loss, {what}, is {decimal(held_out[0][1])} before and at its "
        f"lowest, {decimal(best)}, after {count(best_at)} of {count(losses[-1][0])} tokens.",
        caption=f"Mean {what}, in nats per token{scale}. {taken}{means}",
        legend=(("training", KEPT, "line"), ("held out", CUT, "dot")),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        last = max(losses[-1][0], held_out[-1][0])
        panel.x_limits = (-0.015 * last, 1.015 * last)  # room for the markers at both ends
        most = 4 if sheet.narrow else 8
        panel.x_ticks = [(x, short_tick(x)) for x in ticks(panel.x_limits, most=most)]
        panel.x_label = "tokens trained on"
        span_axis(panel, [loss for _, loss in (*losses, *held_out)])
        panel.line(_means(losses), KEPT, width=1.1)
        if is_early:
            panel.upright(best_at)
        panel.line(held_out, CUT, width=1.1)
        panel.markers(held_out, "dot", 5.0, CUT)

    return draw(words, paint, height=lambda narrow: 2.1 if narrow else 2.6)


def errors(report: Document) -> Plot | None:
    """Return a plot of the error of each layer before and after; None if none was trained alone."""
    blocks = layers(report)
    pairs = [(x.index, x.before, x.after) for x in blocks if x.before is not None]
    known = [(index, before, after) for index, before, after in pairs if after is not None]
    if not known:
        return None
    kept = sum(layer.kept for layer in blocks)
    first, last = (sum(pair[at] for pair in known) / len(known) for at in (1, 2))
    words = Words(
        key="recovered",
        title="Error per layer trained alone",
        description=f"Of {counted(len(blocks), 'layer')}, {kept} are better; the mean error goes "
        f"from {percent(first, digits=2)} to {percent(last, digits=2)}.",
        caption="Squared error of each layer's output on held-out sequences, relative to the "
        f"square of the dense one. The mean goes from {percent(first, digits=2)} to "
        f"{percent(last, digits=2)}.",
        legend=(("before", BEFORE, "box"), ("after", KEPT, "box")),
    )

    def paint(sheet: Sheet) -> None:
        panel = sheet.panel()
        places = [index for index, *_ in known]
        number_axis(panel, [layer.index for layer in blocks])
        panel.bars(places, [before for _, before, _ in known], _BAR, BEFORE)
        inner = _BAR if len(blocks) > _MANY else _INNER
        panel.bars(places, [after for *_, after in known], inner, KEPT)
        top = max(max(before, after) for _, before, after in known)
        value_axis(panel, top, lambda y: f"{y * 100:.3g} %")
        panel.x_label = "layer"

    return draw(words, paint, height=lambda narrow: 1.9 if narrow else 2.1)


def tables(report: Document) -> list[Table]:
    """Return the numbers of the plots, and of the rates that were tried."""
    found = section(report, "recovery")
    made = (
        Table(
            title="Table of the losses",
            columns=("Tokens", "Training loss", "Held-out loss", "Change"),
            rows=tuple(_measures(_points(found, "curve"), _points(found, "held_out_curve"))),
        ),
        Table(
            title="Table of the rates that were tried",
            columns=("Rate", "Held-out loss", "Used"),
            rows=tuple(
                (f"{row['rate']:g}", decimal(row.get("loss")), _yes(row["rate"] == found["rate"]))
                for row in rows(found, "rates")
            ),
        ),
        Table(
            title="Table of the trained layers",
            columns=("Layer", "Before", "After", "Change", "Rate", "Used"),
            rows=tuple(_layer_row(layer) for layer in layers(report)),
        ),
    )
    return [table for table in made if table.rows]


def _measures(losses: Sequence[Point], held_out: Sequence[Point]) -> list[tuple[str, ...]]:
    """Return a row for each held-out loss, with the mean training loss since the one before."""
    made: list[tuple[str, ...]] = []
    before = 0.0
    for at, loss in held_out:
        since = [each for tokens, each in losses if before < tokens <= at]
        mean = sum(since) / len(since) if since else None
        ratio = quotient(loss, held_out[0][1]) if at else None
        made.append((count(at), decimal(mean), decimal(loss), change(ratio)))
        before = at
    return made


def _layer_row(layer: LayerTraining) -> tuple[str, ...]:
    if layer.before is None:
        return (str(layer.index), *[MISSING] * 5)
    return (
        str(layer.index),
        percent(layer.before, digits=3),
        percent(layer.after, digits=3),
        change(quotient(layer.after, layer.before)),
        MISSING if layer.rate is None else f"{layer.rate:g}",
        _yes(layer.kept),
    )


def _points(found: Document, key: str) -> list[Point]:
    """Return (tokens, loss) where the loss is a number."""
    known = [(number(tokens), number(loss)) for tokens, loss in found.get(key) or ()]
    return [(x, y) for x, y in known if x is not None and y is not None]


def _means(points: Sequence[Point]) -> list[Point]:
    xs, ys = (averaged(each, most=MAX_POINTS) for each in zip(*points, strict=True))
    return list(zip(xs, ys, strict=True))


def _data(found: Document) -> str:
    source = str(found.get("data"))
    return _DATA.get(source, source.partition("?")[0])  # without the store's address


def _rates(found: Document) -> str:
    tried = [f"{row['rate']:g}" for row in rows(found, "rates")]
    used = number(found.get("rate"))
    if used is None:
        return ""
    return f" (rate {used:g}" + (f" of {_listed(tried)})" if tried else ")")


def _perplexity(losses: Document, side: str) -> str:
    return decimal(losses[side]) if number(losses.get(side)) else "that is not finite"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _yes(used: bool) -> str:
    return "yes" if used else "no"
