"""The input model continues prompts: the same text, whoever writes it and whatever is lost."""

from collections import Counter
from weakref import WeakSet

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors.numerics.sampling import drawn
from actors.storage.files import Directory
from actors.storage.records import read_records
from actors.storage.tokens import tokens_hash
from orchestrator.backend.executor import FailureClass, InputLost, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.engine import generation, worker_pool
from orchestrator.phases.context import RunContext, new_pool
from orchestrator.phases.open_run import open_run
from orchestrator.phases.self_text import self_text
from orchestrator.prepare.prepared import dense_subject
from orchestrator.prepare.self_text_plan import self_text_plan, text_identity
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.ledger import Ledger
from planners.errors import ClusterError, NumericsError, PlanError
from planners.memory import self_text as sizes
from planners.model.cost import dense_model_form
from tests.builders import DeadDriverError, DyingDriver, prepared_run, save_model

PROMPT, LENGTH, SEED = 6, 14, 11
PARTS = 5  # 20 sequences by 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(sizes, "PART_SEQUENCES", 4)
    monkeypatch.setattr(generation, "AHEAD", 3)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizes, "PART_SEQUENCES", 4)
        return write(model, tmp_path_factory.mktemp("undisturbed"))


def stage_gib(model, num_layers):
    """Return the memory of a worker that holds so many layers while it writes, and not one more."""
    shape = prepared_run(model, model / "unused").plan.shape
    form = dense_model_form(shape)
    load = sizes.writing_load(shape, form, batch=4, prompt=PROMPT, length=LENGTH, dtype="float32")
    tables = 2 if num_layers == shape.num_layers else 1
    return (sum(load.stage(num_layers, tables=tables).values()) + 0.5) / 2**30


def prepared_for(model, out, *, workers=1, gib=1.0, shards=1):
    prepared = prepared_run(model, out, workers=workers, calibration={"shards": shards})
    object.__setattr__(prepared, "config", prepared.config.model_copy(update={"worker_gib": gib}))
    return prepared


def write(model, out, *, executor=None, listener=lambda _: None, interrupt=None, **how):
    """Return the text that a model writes after the first tokens of the calibration data."""
    prepared = prepared_for(model, out, **how)
    open_run(prepared)
    journal = Journal(prepared.run, listener)
    pool = new_pool(prepared, executor or LocalExecutor(), journal)
    if interrupt is not None:
        pool.interruption = interrupt
    context = RunContext(
        prepared=prepared,
        form=prepared.plan.form,
        run=prepared.run,
        ledger=Ledger(prepared.run),
        journal=journal,
        pool=pool,
    )
    prompts = prepared.calibration[:, :PROMPT]
    return self_text(context, dense_subject(prepared), prompts, length=LENGTH, seed=SEED)


def part_records(out):
    found = read_records(Directory(str(out)))
    return {name: record for name, record in found.items() if name.startswith("self-text-")}


class CountingExecutor(LocalExecutor):
    """Counts calls, by method and by worker."""

    def __init__(self):
        self.calls, self.workers = Counter(), set()

    def call(self, handle, method, *args, num_returns=1, label):
        self.calls[method] += 1
        self.workers.add(str(handle).split()[0])
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class LosingExecutor(LocalExecutor):
    """Fails some of all ``generate`` calls; a worker that is lost stays so."""

    def __init__(self, losses, error):
        self._losses, self._error, self._count, self.gone = set(losses), error, 0, WeakSet()

    def call(self, handle, method, *args, num_returns=1, label):
        if method == "generate":
            self._count += 1
            if self._count in self._losses or handle in self.gone:
                if isinstance(self._error, WorkerLost):
                    self.gone.add(handle)
                handle, args = Failing(self._error), ()
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class Failing:
    def __init__(self, error):
        self._error = error

    def generate(self):
        raise self._error


PREEMPTED = WorkerLost(FailureClass.PREEMPTED, "gone")
LOST = WorkerLost(FailureClass.WORKER_CRASHED, "gone")


def test_the_text_is_what_the_stock_model_says_with_the_same_random_numbers(model, undisturbed):
    prompts = load_file(model / "tokens" / "calibration.safetensors")["input_ids"]
    assert undisturbed.shape == (len(prompts), LENGTH)
    assert undisturbed.dtype == np.int64
    ids = torch.from_numpy(undisturbed)
    assert torch.equal(ids[:, :PROMPT], prompts[:, :PROMPT])
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = stock(ids).logits
    for position in range(PROMPT, LENGTH):
        found = drawn(
            logits[:, position - 1], seed=SEED, sequences=range(len(ids)), position=position
        )
        assert torch.equal(found, ids[:, position])


@pytest.mark.parametrize(
    ("layers", "how"),
    [
        (3, {"workers": 2}),
        (3, {"workers": 6, "shards": 2}),
        (2, {"workers": 2}),
        (1, {"workers": 3}),
        (2, {"workers": 4, "shards": 2}),
    ],
)
def test_the_text_does_not_depend_on_the_workers(layers, how, model, undisturbed, tmp_path):
    executor, gib = CountingExecutor(), stage_gib(model, layers)
    found = write(model, tmp_path, gib=gib, executor=executor, **how)
    assert tokens_hash(found) == tokens_hash(undisturbed)
    stages = -(-3 // layers)
    used = min(how["workers"], PARTS * stages)
    assert executor.calls["generate"] == PARTS * (LENGTH - PROMPT) * stages
    assert executor.calls["load"] == len(executor.workers) == used  # each worker once


def test_each_part_has_a_record_and_a_file_with_its_hash(model, undisturbed, tmp_path):
    heard = []
    write(model, tmp_path, listener=heard.append)
    records = part_records(tmp_path)
    assert list(records) == [f"self-text-part-{index:05d}" for index in range(PARTS)]
    for index, record in enumerate(records.values()):
        text = undisturbed[4 * index : 4 * index + 4]
        assert record.values["sha256"] == tokens_hash(text)
        assert record.values["num_tokens"] == text.size - 4 * PROMPT
        assert record.files[0].path == f"tokens/{record.unit}.parquet"
    steps = [event for event in heard if event["kind"] == "self_text"]
    assert [event["unit"] for event in steps] == list(records)


@pytest.mark.parametrize(
    ("losses", "error"),
    [([1], PREEMPTED), ([13], PREEMPTED), ([12, 30, 31], PREEMPTED), ([14], InputLost("gone"))],
    ids=["first", "later", "several", "input"],
)
@pytest.mark.parametrize("how", [(1, 3), (2, 3), (2, 2)], ids=["one", "two", "two stages"])
def test_nor_on_what_is_lost(losses, error, how, model, undisturbed, tmp_path):
    (workers, layers), executor, heard = how, LosingExecutor(losses, error), []
    gib = stage_gib(model, layers)
    found = write(
        model, tmp_path, workers=workers, gib=gib, executor=executor, listener=heard.append
    )
    assert tokens_hash(found) == tokens_hash(undisturbed)
    lost = [event for event in heard if event["kind"] in ("preempted", "lost input")]
    assert 1 <= len(lost) <= len(losses)  # of calls that were made ahead, the first counts
    again = [record for record in part_records(tmp_path).values() if record.attempt > 1]
    assert {each for record in again for each in record.values["retried_after"]} == {
        lost[0]["kind"]
    }


def test_workers_that_are_lost_again_and_again_end_it(model, tmp_path):
    with pytest.raises(ClusterError, match="lost its worker 2 times"):
        write(model, tmp_path, executor=LosingExecutor(range(10**6), LOST))


class DrainingExecutor(LocalExecutor):
    """Announces once, after some calls, that the node of all workers will be gone."""

    def __init__(self, *, after, seconds):
        self._left, self._seconds, self.kills = after, seconds, 0

    def call(self, handle, method, *args, num_returns=1, label):
        self._left -= 1
        return super().call(handle, method, *args, num_returns=num_returns, label=label)

    def draining(self):
        if self._left > 0:
            return {}
        self._left = 10**6
        return {"": self._seconds}

    def kill(self, handle):
        del handle
        self.kills += 1


@pytest.mark.parametrize(("seconds", "attempts"), [(0.0, PARTS + 1), (60.0, PARTS)])
def test_a_part_leaves_a_draining_node_unless_it_will_be_complete_before(
    seconds, attempts, model, undisturbed, tmp_path, monkeypatch
):
    monkeypatch.setattr(worker_pool, "DRAIN_SECONDS", 0.0)
    executor = DrainingExecutor(after=14, seconds=seconds)
    found = write(model, tmp_path, executor=executor)
    assert tokens_hash(found) == tokens_hash(undisturbed)
    assert executor.kills == 1  # no part begins there
    assert sum(record.attempt for record in part_records(tmp_path).values()) == attempts


def test_a_driver_that_resumes_writes_what_is_left(model, undisturbed, tmp_path):
    with pytest.raises(DeadDriverError):
        write(model, tmp_path, listener=DyingDriver("self_text", 2))
    assert len(part_records(tmp_path)) == 2
    executor = CountingExecutor()
    found = write(model, tmp_path, executor=executor, workers=2)
    assert tokens_hash(found) == tokens_hash(undisturbed)
    assert executor.calls["generate"] == (PARTS - 2) * (LENGTH - PROMPT)
    executor = CountingExecutor()
    assert tokens_hash(write(model, tmp_path, executor=executor)) == tokens_hash(undisturbed)
    assert executor.calls == {}


def test_ctrl_c_keeps_the_parts_that_are_complete(model, undisturbed, tmp_path):
    interrupt = worker_pool.Interruption()

    def press(event):
        interrupt.requested |= event["kind"] == "self_text"

    with pytest.raises(KeyboardInterrupt):
        write(model, tmp_path, listener=press, interrupt=interrupt)
    assert len(part_records(tmp_path)) == 1
    assert tokens_hash(write(model, tmp_path)) == tokens_hash(undisturbed)


def test_a_damaged_part_is_written_again(model, undisturbed, tmp_path):
    write(model, tmp_path)
    file = tmp_path / "tokens" / "self-text-part-00001.parquet"
    held = bytearray(file.read_bytes())
    held[len(held) // 3] ^= 1
    file.write_bytes(held)
    executor = CountingExecutor()
    assert tokens_hash(write(model, tmp_path, executor=executor)) == tokens_hash(undisturbed)
    assert executor.calls["generate"] == LENGTH - PROMPT


def test_logits_that_are_not_finite_end_it(tmp_path):
    broken = save_model(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"logits of token \d+ of sequence \d+ are not"):
        write(broken, tmp_path / "run")


def test_a_model_that_all_workers_do_not_hold_is_refused_before_it_is_loaded(model, tmp_path):
    executor = CountingExecutor()
    with pytest.raises(PlanError, match=r"2 workers of .* bytes cannot hold it") as caught:
        write(model, tmp_path, workers=2, gib=stage_gib(model, 1), executor=executor)
    assert "--recover-data" in caught.value.hint
    assert executor.calls == {}


def test_what_determines_the_text_is_known_before_and_does_not_depend_on_workers(model, tmp_path):
    def identity(prepared, seed=SEED, length=LENGTH):
        plan = self_text_plan(prepared, prompt_tokens=PROMPT, length=length, seed=seed)
        units = plan.units(dense_subject(prepared), prepared.calibration[:, :PROMPT])
        return text_identity(units)

    one = prepared_for(model, tmp_path)
    more = prepared_for(model, tmp_path, workers=2, gib=stage_gib(model, 2))
    assert identity(one) == identity(more)
    assert len({identity(one), identity(one, seed=12), identity(one, length=LENGTH - 1)}) == 3
    with pytest.raises(PlanError, match="prompt_tokens"):
        identity(one, length=PROMPT)
