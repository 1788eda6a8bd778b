"""A plan on the terminal: result, memory of the workers, time and cost."""

import math
from collections import Counter
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.forecast.forecast import Forecast
from orchestrator.report.numbers import bytes_text, seconds_text
from planners.budget.schemes import SCHEMES
from planners.budget.served import STOCK, WORTH
from planners.model.cost import dense_model_form, model_bytes
from planners.model.layer import ROLES
from planners.model.serving_load import seconds_at
from planners.model.stored_bytes import bits_a_weight, unquantised
from planners.plan import RunPlan, StagePlan
from planners.simulation.download import FROM_HUB
from planners.simulation.simulate import Quantiles
from planners.simulation.timetable import (
    download_bytes,
    input_bytes,
    phase_work,
    transfer_bytes,
)
from planners.units.job import Job
from planners.units.shards import even_shards

SHOWN = 3  # waves whose layers are printed
KINDS = ("weights", "statistics", "boundaries", "workspace", "libraries")


def show(console: Console, forecast: Forecast, *, title: str, out: str) -> None:
    """Print a plan and its forecast."""
    console.print(Text(title, style="bold"))
    console.print(_facts(forecast, out))
    console.print()
    console.print(_workers(forecast.plan))
    console.print(Text(_fewer(forecast), style="yellow"), end="")
    for said in forecast.few_tokens:
        console.print(Text(said, style="yellow"))
    console.print()
    console.print(_time(forecast))


def _facts(forecast: Forecast, out: str) -> Table:
    plan = forecast.plan
    shape = plan.shape
    rows = {
        "model": f"{shape.model_type}, {shape.num_layers} layers, hidden {shape.hidden}, "
        f"intermediate {shape.intermediate}, {shape.num_heads}/{shape.num_kv_heads} heads, "
        f"vocabulary {shape.vocab_size}, {shape.dtype}",
        **_sizes(forecast),
        **({} if forecast.of_speed else _steps(forecast)),
        **_left(forecast),
        "result": _served(forecast),
        "calibration": f"{plan.calibration_tokens:,} tokens in microbatches of "
        f"{forecast.job.data.microbatch_tokens:,}, {forecast.job.data.dtype}",
        **_recovery(forecast),
        "transfers": f"{bytes_text(transfer_bytes(forecast.job))} between stages",
        **_download(forecast.job),
        "disk": bytes_text(forecast.disk_bytes),
        "run directory": out,
    }
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, how_much in rows.items():
        table.add_row(what, how_much)
    return table


def _recovery(forecast: Forecast) -> dict[str, str]:
    """Return how the result is trained, and what a worker holds for that; empty if it is not."""
    how, plan = forecast.job.recovery, forecast.plan
    if how is None:
        return {}
    what = {"made": "what the cut made", "all": "all tensors of the layers"}
    trained = what.get(how.trains, f"LoRA of rank {how.rank}")
    said = f"{how.mode}: {trained}, on {how.tokens:,} tokens in {how.steps} steps"
    if how.trial_steps:
        rates = ", ".join(f"{rate:g}" for rate in how.rates)
        said += f", after {how.trial_steps} with each rate of {rates}, until one is worse"
    found = {"recovery": said}
    if plan.training_bytes:
        peak = bytes_text(sum(plan.training_bytes.values()))
        parts = ", ".join(f"{k} {bytes_text(v)}" for k, v in plan.training_bytes.items() if v)
        most = min(forecast.num_workers, how.parts)
        where = f"on up to {most}"
        if (fewest := plan.training_workers) > 1:
            over = f"{fewest} workers" if fewest == most else f"{fewest} to {most} workers"
            where = f"its layers divided over {over}"
        found["training"] = f"{peak} a worker, {where}: {parts}"
    return found


def _sizes(forecast: Forecast) -> dict[str, str]:
    plan, times = forecast.plan, forecast.times
    if _quantises(forecast):
        return _stored(forecast)
    if not forecast.of_speed:
        return {"parameters": _parameters(plan)}
    found = {"parameters": f"{plan.parameters_before:,}; those of the result follow from the time "
             "of layers, which a worker measures at the start"}  # fmt: skip
    if times is not None:
        parts = (("MLP", times.mlp), ("attention", times.heads))
        found["times"] = "; ".join(
            f"{name} of one layer, by width: "
            + ", ".join(f"{width} {1e6 * seconds_at(points, width):.0f} us" for width, _ in points)
            for name, points in parts
        )
    return found


def _quantises(forecast: Forecast) -> bool:
    """Return whether matrices of the result are quantised."""
    return forecast.plan.form.is_quantised or SCHEMES.name in forecast.job.options


def _stored(forecast: Forecast) -> dict[str, str]:
    """Return the bytes and bits of a quantised result, or what they are chosen from."""
    job, plan, asked = forecast.job, forecast.plan, forecast.asked
    origin = job.dense
    before = bytes_text(model_bytes(origin, dense_model_form(origin)))
    schemes = str(job.options.get(SCHEMES.name, ""))
    rest = _unquantised(plan)
    if job.spec.measures(job.options):
        after = {
            "keep_bytes": "at most {:,.0f} bytes, as stored",
            "bits": "at most {:g} bits for each weight of the linears, scales included",
            "fit": "what fits {:,.0f} bytes, with keys, values and workspace",
        }
        sizes = [text.format(asked[name]) for name, text in after.items() if name in asked]
        return {
            "weights": f"{before} -> {', '.join(sizes) or _parameters(plan)}",
            "bits": f"chosen with the widths by measured damage, from {schemes.replace(',', ', ')} "
            "and as it is",
        }
    shape, form = plan.shape, plan.form
    found = {
        "weights": f"{before} -> {bytes_text(model_bytes(shape, form))}, as stored",
        "bits": f"{bits_a_weight(shape, form):.3g} a weight of the linears, scales included; "
        f"{_schemes(plan)}",
        "not quantised": rest,
    }
    if plan.parameters_after != plan.parameters_before:
        found["parameters"] = _parameters(plan)
    return found


def _schemes(plan: RunPlan) -> str:
    """Return in how many matrices each scheme is used."""
    used = Counter(str(s) for layer in plan.form.layers for s in layer.schemes.values())
    used.update(f"{scheme} ({table})" for table, scheme in plan.form.tables.items())
    if len(used) == 1:
        return f"{next(iter(used))} in every linear"
    return ", ".join(f"{scheme} in {count}" for scheme, count in used.most_common())


def _unquantised(plan: RunPlan) -> str:
    dtype = plan.form.dtype or plan.shape.dtype
    said = f"{', '.join(unquantised(plan.shape, plan.form))}, in {dtype}"
    return said + ("; --dtype bfloat16 stores them in half" if dtype == "float32" else "")


def _parameters(plan: RunPlan) -> str:
    return (
        f"{plan.parameters_before:,} -> {plan.parameters_after:,} "
        f"({plan.keep_fraction:.4f} kept, true counts)"
    )


def _served(forecast: Forecast) -> str:
    options = forecast.job.options
    if options.get("servable") == "auto" and forecast.job.spec.measures(options) == "damage":
        return (
            "a stock model if its predicted damage is at most "
            f"{WORTH:g} times that of free widths, else needs trust_remote_code=True"
        )
    if options.get("servable") in STOCK or forecast.plan.form.native:
        return "a stock model"
    return "needs trust_remote_code=True"


def _left(forecast: Forecast) -> dict[str, str]:
    """Return the modules that the methods leave as they are, and why, if there are any."""
    found = [
        f"{module}, by {job.spec.name}: {reason}"
        for job in forecast.steps
        for module, reason in job.spec.leaves(job.shape, job.options).items()
    ]
    return {"unchanged": "; ".join(found)} if found else {}


def _download(job: Job) -> dict[str, str]:
    """Return what workers read from the Hub, if the input is there."""
    size, once = download_bytes(job), input_bytes(job)
    if not size:
        return {}
    return {
        "download": f"{bytes_text(size)} from the Hub: {bytes_text(once)} of weights "
        f"{size / once:.1f} times, each part by the worker that needs it; assumed: "
        f"{FROM_HUB / 1e9:g} GB/s per worker"
    }


def _steps(forecast: Forecast) -> dict[str, str]:
    """Return the widths; for several steps those of each, and the parameters left after it."""
    if not forecast.job.former:
        if _quantises(forecast):
            return {}  # what is said of bits is of widths, too
        return {"widths": _widths(forecast.plan)}
    return {
        f"step {number}, {job.spec.name}": f"{job.plan.parameters_after:,} left "
        f"({job.plan.keep_fraction:.4f}); {_widths(job.plan)}"
        for number, job in enumerate(forecast.steps, start=1)
    }


def _workers(plan: RunPlan) -> RenderableType:
    """Return the layers of the stages, wave by wave, and the bytes of the largest by kind."""
    waves = len(plan.waves)
    stages = max(map(len, plan.waves))
    head = f"{waves} wave{'s' if waves > 1 else ''} of up to {stages} "
    head += f"stage{'s' if stages > 1 else ''}, one per worker"
    if plan.chains > 1:
        head += f"; {plan.chains} such chains in parallel"
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
    for kind in (*KINDS, "peak"):
        table.add_column(kind, justify="right", no_wrap=True)
    largest = max((s for wave in plan.waves for s in wave), key=_bytes)
    cells = [bytes_text(largest.bytes.get(kind, 0)) for kind in KINDS]
    table.add_row(*cells, Text(bytes_text(_bytes(largest)), style="bold"))
    fullest = Text(f"the fullest worker, layers {_layers(largest)}:")
    said = [" ".join(_layers(stage) for stage in wave) for wave in plan.waves]
    if len(said) > SHOWN:
        said = [*said[: SHOWN - 1], "...", said[-1]]
    lines = Text("\n".join(_cut(line) for line in said), style="dim")
    return Group(Text(head), lines, Text(), fullest, table)


def _fewer(forecast: Forecast) -> str:
    """Return how many workers a pass can use, if there are more."""
    plan, workers = forecast.plan, forecast.num_workers
    fewest = 0
    for wave in plan.waves:
        longest = max(stage.last - stage.first for stage in wave)
        fewest = max(fewest, -(-(wave[-1].last - wave[0].first) // longest))
    fewest *= plan.chains
    if fewest >= workers:
        return ""
    said = f"{fewest} workers process tokens as fast as {workers}: a stage has whole layers"
    shards = even_shards(plan.shape.num_layers, workers, forecast.job.num_microbatches)
    return f"{said}; --shards {shards} uses all: compare its plan\n" if shards else f"{said}\n"


def _time(forecast: Forecast) -> RenderableType:
    """Return operations, seconds and money; for unknown devices only the operations."""
    found, clock = forecast.outlook, forecast.clock
    work = phase_work(forecast.job)
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="dim")
    table.add_column("phase")
    table.add_column("operations", justify="right", no_wrap=True)
    for name in ("p10", "p50", "p90") if found else ():
        table.add_column(name, justify="right", no_wrap=True)
    phases = list(found.phases) if found else list(work)
    for name in phases:
        flops = f"{work[name].flops / 1e12:,.4g} TFLOP" if name in work else ""
        table.add_row(name, flops, *(_quantiles(found.phases[name]) if found else ()))
    if found is None or clock is None:
        said = f"the speed of a worker is unknown ({forecast.device or 'no device here'}): "
        return Group(
            table, Text(said + "no time is estimated; name a device with --cluster 8xA100-80GB")
        )
    bold = "bold"
    flops = f"{sum(w.flops for w in work.values()) / 1e12:,.4g} TFLOP"
    table.add_row("time", flops, *_quantiles(found.seconds), style=bold)
    lines: list[RenderableType] = []
    if found.money is not None:
        money = [f"{m:,.2f}" for m in (found.money.p10, found.money.p50, found.money.p90)]
        table.add_row("cost, in the currency of --price", "", *money, style=bold)
    if forecast.terms.preemptions_per_hour:
        lost = [f"{x:.0f}" for x in (found.losses.p10, found.losses.p50, found.losses.p90)]
        table.add_row("workers lost", "", *lost)
    workers = f"{forecast.num_workers} worker{'s' if forecast.num_workers > 1 else ''}"
    lines.append(
        Text(
            f"times are {clock.source}; {found.draws} simulated runs on {workers}, busy "
            f"{found.busy:.0%} of the time; excluding the start of Ray",
            style="dim" if clock.samples else "yellow",
        )
    )
    lines += [Text(note, style="yellow") for note in forecast.notes(work)]
    return Group(table, *lines)


def _quantiles(found: Quantiles) -> list[str]:
    return [seconds_text(s) for s in (found.p10, found.p50, found.p90)]


def _bytes(stage: StagePlan) -> int:
    return sum(stage.bytes.values())


def _layers(stage: StagePlan) -> str:
    return f"{stage.first}-{stage.last - 1}" if stage.last - stage.first > 1 else f"{stage.first}"


def _cut(line: str, longest: int = 76) -> str:
    """Return a list cut with dots to fit one line."""
    return line if len(line) <= longest else line[: line.rindex(" ", 0, longest - 3)] + " ..."


def _widths(plan: Any) -> str:
    shape, layers = plan.shape, plan.form.layers
    said = []
    for name, before, values in (
        ("residual", shape.hidden, [layer.residual_in for layer in layers]),
        ("intermediate", shape.intermediate, [layer.intermediate for layer in layers]),
        ("q/k head", shape.head_dim, [layer.qk_head_dim for layer in layers]),
        ("v/o head", shape.head_dim, [layer.vo_head_dim for layer in layers]),
    ):
        low, high = min(values), max(values)
        if low < before:
            said.append(f"{name} {before} -> {low if low == high else f'{low}-{high}'}")
    ranks = [_ranks(name, [x.ranks[name] for x in layers if name in x.ranks], len(layers))
             for name in ROLES if any(name in x.ranks for x in layers)]  # fmt: skip
    if ranks:
        said.append(f"ranks: {', '.join(ranks)}")
    takers = {i: sorted({link.layer for link in x.links.values()}) for i, x in enumerate(layers)}
    if any(takers.values()):
        pairs = [f"{i} of {', '.join(map(str, own))}" for i, own in takers.items() if own]
        said.append(_cut(f"layers that take tensors of others: {'; '.join(pairs)}", 120))
    return "; ".join(said) or "unchanged"


def _ranks(name: str, ranks: list[int], num_layers: int) -> str:
    low, high = min(ranks), max(ranks)
    where = "" if len(ranks) == num_layers else f" in {len(ranks)} of {num_layers} layers"
    return f"{name} {low if low == high else f'{low}-{high}'}{where}"


def money_text(forecast: Forecast) -> str:
    """Return one line on the time and cost of a run."""
    found = forecast.outlook
    if found is None:
        return "the time it takes is unknown"
    said = f"{seconds_text(found.seconds.p50)}, at most {seconds_text(found.seconds.p90)}"
    if found.money is None:
        return said
    most = math.ceil(found.money.p90 * 100) / 100
    return f"{said}; about {found.money.p50:,.2f}, at most {most:,.2f} in nine of ten cases"
