"""The table of the kinds of units, and of the phases that do them.

A unit is named by its kind and its layer or site: ``damage-layer-00003``, ``basis-site-00006``. A
kind that a worker does by itself has a function in `actors.layer_units.registry`, under the same
name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from planners.memory import peaks, training
from planners.memory.peaks import Shrinking
from planners.units import job as works
from planners.units.job import Job
from planners.units.work import Work

# How far a layer is, once its unit has a record.
WAITING, SUMMED, MEASURED, DONE = "waiting", "statistics", "measured", "done"
STATES = (WAITING, SUMMED, MEASURED, DONE)

MODEL, STATISTICS = "model", "statistics"  # what of a run's result the files of a unit are


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A part of a run that is shown to users.

    Attributes:
        name: as events, forecasts and reports have it.
        first_words: shown until its first unit is done.
        by_workers: the workers of the run do it; else the driver, or a process of its own.
        times: how often a run does it.
    """

    name: str
    first_words: str = ""
    by_workers: bool = True
    times: int = 1


# In the order in which they end.
PHASES = {
    phase.name: phase
    for phase in (
        Phase(name="calibrate", first_words="loading layers"),
        Phase(name="allocate"),
        Phase(name="compress"),
        Phase(name="refit"),
        Phase(name="recover", first_words="loading both models"),
        Phase(name="stitch", by_workers=False),
        Phase(name="evaluate", times=2),  # the input model, and the result
        Phase(
            name="verify",
            by_workers=False,
            first_words="a fresh process loads, checks and runs the result",
        ),
        Phase(
            name="throughput",
            by_workers=False,
            first_words="a fresh process times both models in turn",
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitKind:
    """One kind of unit.

    Attributes:
        name: as units, events and clocks have it.
        stem: of the names of its units, without numbers; two kinds of which a run has one or the
            other may share one.
        phase: that does it.
        of: what one unit is of: ``layer``, ``site``, all ``sites``, ``microbatch``, or ``model``.
        counts: it is one step of the progress of its phase.
        by_worker: a worker does it by itself, by a function of the registry.
        state: how far its layer is, once it is done.
        leaves: ``model`` or ``statistics``, where its files are a part of the result.
        reusable: another run of the same model and data may take it.
        own_options: a layer may have options of its own there.
        reads: of the weights of the input, ``layer`` or ``table``; empty if none.
        alike: where layers are alike, all its units take alike time.
        colour: in the report, the number of one of `orchestrator.report.svg.KIND_COLOURS`.
        work: (job, index) -> the work of one unit; None if a pass does it.
        peak_bytes: peak memory of the largest unit; 0 if a run has none.
    """

    name: str
    stem: str
    phase: str
    of: str = "layer"
    counts: bool = True
    by_worker: bool = True
    state: str = WAITING
    leaves: str = ""
    reusable: bool = False
    own_options: bool = False
    reads: str = ""
    alike: bool = True
    colour: int
    work: Callable[[Job, int], Work] | None = None
    peak_bytes: Callable[[Shrinking], int] = peaks.nothing

    def unit(self, index: int, *, by: str = "") -> str:
        """Return the name of one unit; ``by`` is its method, if several compete."""
        first, _, last = self.stem.partition("-")
        stem = f"{first}-{by}-{last}" if by else self.stem
        return f"{stem}-{index:05d}" if self.of in ("layer", "site") else stem


KINDS = {
    kind.name: kind
    for kind in (
        # Full microbatches in a stage, and the sums that it publishes after them.
        UnitKind(
            name="calibrate", stem="microbatch", phase="calibrate", of="microbatch",
            by_worker=False, colour=0,
        ),
        UnitKind(
            name="shard", stem="shard-layer", phase="calibrate", by_worker=False, counts=False,
            colour=1,
        ),
        UnitKind(
            name="statistics", stem="statistics-layer", phase="calibrate", counts=False,
            state=SUMMED, leaves=STATISTICS, reusable=True, colour=1, work=works.adding,
        ),
        UnitKind(
            name="partial", stem="partial-layer", phase="calibrate", by_worker=False, counts=False,
            colour=1,
        ),
        UnitKind(
            name="boundary", stem="boundary-layer-mb", phase="calibrate", of="microbatch",
            by_worker=False, counts=False, colour=0,
        ),
        # Planned before it is known whether a step will rotate sums or sum anew.
        UnitKind(
            name="carried", stem="carried-layer", phase="calibrate", state=SUMMED,
            leaves=STATISTICS, colour=1, work=works.carrying,
        ),
        # Before calibration: a speed that no cut reaches is refused at once.
        UnitKind(
            name="times", stem="times", phase="allocate", of="model", counts=False, colour=10,
            work=works.timing,
        ),
        UnitKind(
            name="damage", stem="damage-layer", phase="allocate", state=MEASURED, reusable=True,
            reads="layer", colour=10, work=works.measuring, peak_bytes=peaks.damage_unit,
        ),
        UnitKind(
            name="losses", stem="losses-layer", phase="allocate", state=MEASURED, reads="layer",
            colour=10, work=works.truncating, peak_bytes=peaks.layer_unit,
        ),
        UnitKind(
            name="basis", stem="basis-site", phase="compress", of="site", colour=2,
            work=works.decomposing, peak_bytes=peaks.basis_unit,
        ),
        UnitKind(
            name="basis_shared", stem="basis-shared", phase="compress", of="sites", colour=2,
            work=works.decomposing_all, peak_bytes=peaks.basis_unit,
        ),
        UnitKind(
            name="basis_sequential", stem="basis-site", phase="compress", of="site", alike=False,
            colour=2, work=works.decomposing_streamed, peak_bytes=peaks.basis_unit,
        ),
        UnitKind(
            name="stream", stem="stream-site-shard", phase="compress", of="site", alike=False,
            reads="layer", colour=2, work=works.streaming, peak_bytes=peaks.stream_unit,
        ),
        UnitKind(
            name="layer", stem="layer", phase="compress", state=DONE, leaves=MODEL,
            own_options=True, reads="layer", colour=3, work=works.shrinking,
            peak_bytes=peaks.layer_unit,
        ),
        UnitKind(
            name="draft", stem="draft-layer", phase="compress", state=MEASURED, own_options=True,
            reads="layer", colour=3, work=works.shrinking, peak_bytes=peaks.layer_unit,
        ),
        UnitKind(
            name="embedding", stem="embedding", phase="compress", of="model", leaves=MODEL,
            reads="table", colour=4, work=works.embedding, peak_bytes=peaks.table_unit,
        ),
        UnitKind(
            name="head", stem="head", phase="compress", of="model", leaves=MODEL, reads="table",
            colour=4, work=works.head, peak_bytes=peaks.table_unit,
        ),
        UnitKind(
            name="refit_start", stem="refit-start", phase="refit", of="model", reads="table",
            colour=3, work=works.refit_start,
        ),
        UnitKind(
            name="refit_layer", stem="refit-layer", phase="refit", state=MEASURED, reads="layer",
            colour=3, work=works.refitting, peak_bytes=peaks.refit_unit,
        ),
        UnitKind(
            name="refit_losses", stem="refit-losses", phase="refit", of="model", reads="table",
            colour=3, work=works.refit_losses,
        ),
        UnitKind(
            name="chosen", stem="layer", phase="refit", state=DONE, leaves=MODEL, colour=3,
            work=works.choosing,
        ),
        UnitKind(
            name="inputs", stem="inputs-layer-shard", phase="recover", of="site", reads="layer",
            colour=2, work=works.passing_dense, peak_bytes=training.inputs_unit,
        ),
        UnitKind(
            name="recover_layer", stem="recover-layer", phase="recover", state=MEASURED,
            reads="layer", colour=3, work=works.recovering_layer,
            peak_bytes=training.layer_unit,
        ),
        UnitKind(
            name="recover_model", stem="recover-model", phase="recover", of="model",
            by_worker=False, colour=3, work=works.recovering_model,
        ),
        UnitKind(
            name="export_layer", stem="export-layer", phase="recover", state=MEASURED, colour=5,
            work=works.choosing,
        ),
        UnitKind(
            name="export_embedding", stem="export-embedding", phase="recover", of="model",
            counts=False, colour=5, work=works.embedding,
        ),
        UnitKind(
            name="export_head", stem="export-head", phase="recover", of="model", counts=False,
            colour=5, work=works.head,
        ),
        UnitKind(
            name="recover_choice", stem="recover-choice", phase="recover", of="model",
            by_worker=False, counts=False, colour=7,
        ),
        UnitKind(
            name="kept_layer", stem="kept-layer", phase="recover", state=DONE, leaves=MODEL,
            colour=5, work=works.choosing,
        ),
        UnitKind(
            name="kept_embedding", stem="kept-embedding", phase="recover", of="model",
            counts=False, leaves=MODEL, colour=5, work=works.embedding,
        ),
        UnitKind(
            name="kept_head", stem="kept-head", phase="recover", of="model", counts=False,
            leaves=MODEL, colour=5, work=works.head,
        ),
        # The input model writes the text that the result is trained on.
        UnitKind(
            name="self_text", stem="self-text-part", phase="recover", of="microbatch",
            by_worker=False, colour=8,
        ),
        UnitKind(
            name="stitch", stem="stitch", phase="stitch", of="model", by_worker=False, leaves=MODEL,
            colour=5,
        ),
        UnitKind(
            name="evaluate", stem="evaluation-dense-part", phase="evaluate", of="microbatch",
            by_worker=False, reusable=True, colour=7,
        ),
        UnitKind(
            name="evaluate_compressed", stem="evaluation-part", phase="evaluate", of="microbatch",
            by_worker=False, colour=7,
        ),
        UnitKind(
            name="verify", stem="verify", phase="verify", of="model", by_worker=False, colour=6,
        ),
        UnitKind(
            name="throughput", stem="throughput", phase="throughput", of="model", by_worker=False,
            colour=8,
        ),
    )
}  # fmt: skip


def kind_of(unit: str) -> UnitKind | None:
    """Return the kind of the unit of that name, the first where several share it; None if none.

    A name may say between its first word and its last who did the unit, or of what model it is.
    """
    words = [word for word in unit.split("-") if not word.isdigit()]
    ends = [words[0], words[-1]] if len(words) > 1 else []
    for parts in (words, ends):
        found = [kind for kind in KINDS.values() if kind.stem.split("-") == parts]
        if found:
            return found[0]
    return None


def layer_of(unit: str) -> int | None:
    """Return the layer that a unit of that name is of; None where it is of none."""
    kind, number = kind_of(unit), unit.rpartition("-")[2]
    return int(number) if kind is not None and kind.of == "layer" and number.isdigit() else None


def kinds_of(phase: str, *, many: bool = False) -> tuple[str, ...]:
    """Return the kinds whose units are the steps of a phase; if asked, those with many units."""
    return tuple(
        kind.name
        for kind in KINDS.values()
        if kind.phase == phase and kind.counts and not (many and kind.of == "model")
    )


def behind(phase: str) -> tuple[str, ...]:
    """Return the phases that come after a phase."""
    names = tuple(PHASES)
    return names[names.index(phase) + 1 :]


def unit_bytes(step: Shrinking) -> int:
    """Return the peak memory of the largest compression unit."""
    return max(peak(step) for peak in {kind.peak_bytes for kind in KINDS.values()})
