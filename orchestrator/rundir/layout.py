"""Names of files and folders in a run directory, and how long what is in them stays."""

from collections.abc import Iterator
from dataclasses import dataclass

from actors.storage.files import Directory

STAYS, WITH_STATISTICS, GOES = "stays", "with statistics", "goes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """One folder of a run, or of one of its steps.

    Attributes:
        name: in the run directory.
        holds: what is in it.
        ready: once the run is READY its files stay, go, or stay with ``keep_statistics`` alone.
        passed: likewise in the directory of a step, once the step behind it is done.
    """

    name: str
    holds: str
    ready: str
    passed: str


FOLDERS = tuple(
    Folder(name=name, holds=holds, ready=ready, passed=passed)
    for name, holds, ready, passed in (
        ("tokens", "calibration and evaluation tokens", STAYS, WITH_STATISTICS),
        ("events", "what happened when", STAYS, STAYS),
        ("records", "one a unit that is done", STAYS, STAYS),
        ("failures", "what is needed to make a failure come again", STAYS, STAYS),
        ("steps", "the steps before the last, each as a run", STAYS, STAYS),
        ("model", "the result; the input of the next step", STAYS, GOES),
        ("deci", "the result as vLLM and llama.cpp read FFN widths by layer", STAYS, GOES),
        ("stats", "sums of each layer", WITH_STATISTICS, WITH_STATISTICS),
        # The next step alone reads those of a step; those of the last serve layers made again.
        ("basis", "axes of each site", WITH_STATISTICS, GOES),
        ("shards", "sums over parts of the tokens, until they are added", GOES, GOES),
        ("partial", "sums over the first microbatches of a pass", GOES, GOES),
        ("boundary", "activations between waves, halves of layers and sites", GOES, GOES),
        ("draft", "layers that are to be refitted", GOES, GOES),
        ("refit", "layers that were", GOES, GOES),
        ("unrecovered", "the result before it is trained, a checkpoint", GOES, GOES),
        ("recovered", "the trained one", GOES, GOES),
        ("training", "checkpoints of the training", GOES, GOES),
    )
)

RESULT = "model/"  # below it lies what a user loads
MAY_BE_GONE = tuple(f"{folder.name}/" for folder in FOLDERS if folder.ready != STAYS)  # if READY
HALF_WRITTEN = ".tmp"  # how the name of a file ends that a killed worker was writing

CALIBRATION_TOKENS = "tokens/calibration.parquet"
EVALUATION_TOKENS = "tokens/evaluation.parquet"
RECOVERY_TOKENS = "tokens/recovery.parquet"  # those that are held out come last

READY = "READY"
REPORT = "report.json"
JOB = "job.json"  # which job of which cluster works on it; see `orchestrator.remote.submission`
STITCH = "stitch"  # the unit of index, config and tokenizer


def spent_files(run: Directory, *, keep_statistics: bool) -> Iterator[str]:
    """Yield what served only the work of a run that is READY, and what is half-written."""
    going = (GOES,) if keep_statistics else (GOES, WITH_STATISTICS)
    for folder in FOLDERS:
        names = run.names(folder.name)
        yield from (n for n in names if folder.ready in going or n.endswith(HALF_WRITTEN))


def passed_files(step: Directory, *, keep_statistics: bool) -> Iterator[str]:
    """Yield what a step has left and nobody needs once the step behind it is done."""
    going = (GOES,) if keep_statistics else (GOES, WITH_STATISTICS)
    for folder in FOLDERS:
        if folder.passed in going:
            yield from step.names(folder.name)
