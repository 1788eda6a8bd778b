"""What a reproducer holds of a failure comes back as it was, whatever the types of its fields."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.layer_units.reads import Reads
from actors.layer_units.registry import do_unit
from actors.messages import (
    Assignment,
    CompressionJob,
    Microbatch,
    UnitTask,
    WorkerSetup,
)
from actors.storage.files import Directory, FileEntry
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.main import main
from orchestrator.engine.reproduce import CALL, SETUP, PassCall, UnitCall
from planners.batching import TokenBatching
from planners.errors import CompressionError, StorageError
from planners.model.serving_load import ServingLoad
from planners.model.taps import Statistic
from planners.recovery import Recovery
from tests.builders import compress_local, layer_file, save_model
from tests.strategies import model_forms, shapes

TEXTS = st.text(st.characters(codec="utf-8"), max_size=9)
COUNTS = st.integers(-1, 2**40)
RANGES = st.tuples(COUNTS, COUNTS)
OPTIONS = st.dictionaries(
    TEXTS, TEXTS | st.integers() | st.floats(allow_nan=False) | st.booleans(), max_size=3
)
MAKERS = st.lists(st.dictionaries(TEXTS, TEXTS, max_size=2), max_size=2).map(tuple)
STATISTICS = st.frozensets(st.builds(Statistic, TEXTS, TEXTS), max_size=3)


def every(message, **special):
    """Draw a message; each of its fields must be drawn here, or be of a type that is known."""
    of_type = {str: TEXTS, int: COUNTS, bool: st.booleans()}
    drawn = {f.name: of_type.get(f.type) for f in fields(message)} | special
    return st.builds(message, **drawn)


CONTENTS = st.dictionaries(TEXTS, TEXTS, max_size=2)
ENTRIES = st.tuples(TEXTS, every(FileEntry)).map(lambda pair: (pair,))
SUMS = st.dictionaries(COUNTS, ENTRIES, max_size=2)

NUMBERS = st.floats(allow_nan=False)
RECOVERIES = every(
    Recovery,
    rates=st.lists(NUMBERS, max_size=3).map(tuple),
    **dict.fromkeys(("weight_decay", "clip", "alpha", "dropout"), NUMBERS),
)


@st.composite
def jobs(draw, depth=1):
    shape = draw(shapes(max_layers=2))
    former = st.none() | jobs(depth=depth - 1) if depth else st.none()
    job = every(
        CompressionJob,
        options=OPTIONS,
        shape=st.just(shape),
        form=model_forms(shape),
        batching=every(TokenBatching),
        former=former,
        layer_options=st.dictionaries(COUNTS, OPTIONS, max_size=3),
        makers=MAKERS,
        sums=SUMS,
        contents=CONTENTS,
        candidates=st.dictionaries(TEXTS, OPTIONS, max_size=2),
        pair_order=st.lists(COUNTS, max_size=3).map(tuple),
        load=st.none() | every(ServingLoad),
        recovery=st.none() | RECOVERIES,
    )
    return draw(job)


TASKS = every(UnitTask, inputs=st.lists(TEXTS, max_size=3).map(tuple))
ASSIGNMENTS = every(Assignment, statistics=STATISTICS, contents=CONTENTS)
CALLS = st.builds(UnitCall, task=TASKS, job=jobs()) | st.builds(
    PassCall, assignment=ASSIGNMENTS, microbatch=st.none() | every(Microbatch, rows=RANGES)
)


def typed(value):
    """Return a value with the types of all it is made of: 1, 1.0 and True are equal otherwise."""
    if hasattr(value, "__slots__"):
        return type(value), {name: typed(getattr(value, name)) for name in value.__slots__}
    if isinstance(value, dict):
        return dict, {(type(k), k): typed(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple, [typed(v) for v in value]
    return type(value), value


@settings(max_examples=20)
@given(call=CALLS, setup=every(WorkerSetup))
def test_messages_come_back_from_json_as_they_were(call, setup):
    for adapter, sent in ((CALL, call), (SETUP, setup)):
        text = json.dumps(adapter.dump_python(sent, mode="json"), sort_keys=True)
        assert typed(adapter.validate_python(json.loads(text))) == typed(sent)


class LosingExecutor(LocalExecutor):
    """Loses the worker of one unit, again and again."""

    def __init__(self, label):
        self._label = label

    def call(self, handle, method, *args, num_returns=1, label):
        tickets = super().call(handle, method, *args, num_returns=num_returns, label=label)
        if label == self._label:
            (tickets if num_returns == 1 else tickets[0]).error = WorkerLost(
                FailureClass.STALLED, "silent"
            )
        return tickets


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def failing(model, out, unit, **recipe):
    """Do a run that loses one unit's worker until it stops; return the reproducer."""
    with pytest.raises(CompressionError):
        compress_local(model, out, executor=LosingExecutor(unit), workers=2, **recipe)
    (reproducer,) = Path(out).rglob(f"failures/{unit}.json")
    return reproducer


def test_a_layer_with_options_of_its_own_is_done_again_with_them(model, tmp_path):
    own = {"layer_options": {1: {"ridge": 0.5}}}
    recipe = {
        "method": "modegpt",
        "keep_fraction": 0.8,
        "options": {"modules": "mlp", "allocation": "uniform"},
        "keep_statistics": True,
    }
    out = tmp_path / "run"
    reproducer = failing(model, out, "layer-00001", **recipe, **own)
    call = CALL.validate_python(json.loads(reproducer.read_text())["call"])
    assert call.job.layer_options == own["layer_options"]
    do_unit(call.task, call.job, run=Directory(str(out)), reads=Reads("cpu"))
    again = layer_file(out / "model", 1).read_bytes()
    for name, more in (("own", own), ("common", {})):
        compress_local(model, tmp_path / name, **recipe, **more)
    assert again == layer_file(tmp_path / "own/model", 1).read_bytes()
    assert again != layer_file(tmp_path / "common/model", 1).read_bytes()


def test_a_unit_that_reads_the_step_before_is_done_again(model, tmp_path, capsys):
    steps = [
        {"method": "slicegpt", "slice": 0.0},
        {"method": "modegpt", "keep_fraction": 0.8, "options": {"modules": "mlp"}},
    ]
    reproducer = failing(model, tmp_path, "carried-layer-00001", steps=steps, keep_statistics=True)
    main(["reproduce", str(reproducer)])
    assert "the work did not fail here" in capsys.readouterr().out


NO_FAILURES = (None, "", "[]", "{", '{"call": 1, "worker": {}}', "\x00", "[" * 10**5)


@pytest.mark.parametrize("text", NO_FAILURES, ids=lambda text: str(text)[:9])
def test_a_file_that_holds_no_failure_is_refused_in_a_line(text, tmp_path, capsys):
    file = tmp_path / "layer-00001.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["reproduce", str(file)])
    assert left.value.code == StorageError.exit_code
    said = capsys.readouterr().err
    assert said.startswith("StorageError: ")
    assert "Traceback" not in said
