"""Records are the only proof that a unit is done; a torn one proves nothing."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import UnitDone
from actors.storage.files import Directory
from actors.storage.records import is_intact, read_records
from orchestrator.rundir.ledger import Ledger
from planners.units.units import Unit

UNIT = Unit(name="layer-00003", kind="layer", index=3, inputs=(), fingerprint="f" * 64)


@pytest.fixture
def run(tmp_path):
    return Directory(str(tmp_path))


def committed(run, *, unit=UNIT, data=b"weights", values=None):
    """Do a unit that writes one file, as a worker and the driver would."""
    entry = run.write(f"model/{unit.name}.safetensors", data)
    done = UnitDone(
        unit=unit.name, worker="worker-0", incarnation="one", device="cpu", files=(entry,),
        values=values or {}, started=1.5, seconds=0.25,
    )  # fmt: skip
    return Ledger(run).commit(unit, done, attempt=2)


JSON_VALUES = st.dictionaries(
    st.text(max_size=5), st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
)


@given(values=JSON_VALUES)
def test_a_record_is_read_as_it_was_written(tmp_path_factory, values):
    run = Directory(str(tmp_path_factory.mktemp("run")))
    record = committed(run, values=values)
    assert read_records(run) == {UNIT.name: record}
    assert is_intact(run, record, hashes=True)


def test_a_unit_with_its_record_is_done_for_the_next_driver(run):
    committed(run)
    assert Ledger(run).done(UNIT)


@pytest.mark.parametrize("num_bytes", [0, 1, 20, 200])
def test_a_torn_record_is_none(run, num_bytes):
    committed(run)
    data = run.read(f"records/{UNIT.name}.json")
    run.write(f"records/{UNIT.name}.json", data[:num_bytes])
    assert read_records(run) == {}
    assert not Ledger(run).done(UNIT)


@pytest.mark.parametrize("data", [b"[]", b"{}", b"null", b'{"files": 3}', b"\xff\xfe"])
def test_a_record_that_says_something_else_is_none(run, data):
    committed(run)
    run.write(f"records/{UNIT.name}.json", data)
    assert not Ledger(run).done(UNIT)


def test_a_record_under_the_name_of_another_unit_is_none(run):
    committed(run)
    run.write("records/layer-00004.json", run.read(f"records/{UNIT.name}.json"))
    assert not Ledger(run).done(replace(UNIT, name="layer-00004"))


def test_a_unit_whose_file_is_gone_is_not_done(run):
    run.delete(committed(run).files[0].path)
    assert not Ledger(run).done(UNIT)


def test_a_unit_whose_file_was_cut_is_not_done(run):
    run.write(committed(run).files[0].path, b"weight")
    assert not Ledger(run).done(UNIT)


def test_a_unit_whose_file_changed_is_not_done_where_hashes_are_checked(run):
    record = committed(run)
    run.write(record.files[0].path, b"wEights")
    assert not is_intact(run, record, hashes=True)
    assert not Ledger(run, verify_hashes=True).done(UNIT)


def test_a_unit_with_other_inputs_is_not_done(run):
    committed(run)
    assert not Ledger(run).done(replace(UNIT, fingerprint="0" * 64))


def test_units_that_are_done_count_as_resumed(run):
    committed(run)
    ledger = Ledger(run)
    other = replace(UNIT, name="layer-00004")
    assert ledger.todo([UNIT, other]) == [other]
    assert ledger.num_resumed == 1


def test_a_record_keeps_who_did_it_and_which_attempt_it_was(run):
    record = committed(run)
    assert (record.worker, record.incarnation, record.attempt) == ("worker-0", "one", 2)
    assert (record.started, record.seconds) == (1.5, 0.25)


def test_a_file_that_fails_half_way_leaves_the_old_one_and_nothing_else(run, tmp_path):
    run.write("model/x", b"old")
    with pytest.raises(ZeroDivisionError), run.writing("model/x") as stream:  # noqa: PT012 the point is what the block leaves
        stream.write(b"half")
        raise ZeroDivisionError
    assert run.read("model/x") == b"old"
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["x"]
