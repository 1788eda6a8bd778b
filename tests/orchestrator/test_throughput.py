"""Models that fit no worker generate through stages: the same tokens, whatever is lost."""

import contextlib
import json
import subprocess
import sys
from weakref import WeakSet

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from actors.messages import ThroughputRequest, UnitDone, WorkerSetup, pack, unpack
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.worker.stage import Stage
from orchestrator.backend import ray_cluster
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.main import cli
from orchestrator.engine.interrupt import Interruption
from orchestrator.engine.worker_pool import Pool
from orchestrator.experiments import inspect
from orchestrator.phases.calibrate import assignments
from orchestrator.phases.throughput import Workers, batch_that_fits, through_stages
from orchestrator.report import summary
from orchestrator.rundir.journal import Journal
from planners.errors import ClusterError, ModelError
from planners.memory.generation import fewest_stages, generation_load, whole_bytes
from planners.memory.peaks import LIBRARIES
from planners.timing import BATCHES
from tests.builders import VOCABULARY, compress_local, run_local, save_model, worker_gib

NEW_TOKENS = 6
SETUP = WorkerSetup(name="worker-0", incarnation="one", threads=1, device="cpu")
SIZES = {
    "slicegpt": {"slice": 0.25},
    "modegpt": {"keep_fraction": 0.8},
    "svdllm": {"keep_fraction": 0.8},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def request_of(*uris, batches=(2,), prompt=5, new_tokens=NEW_TOKENS):
    return ThroughputRequest(
        uris={str(uri): str(uri) for uri in uris}, prompt=prompt, batches=batches,
        new_tokens=new_tokens, max_rounds=2,
    )  # fmt: skip


def load_of(uri, request):
    found = Checkpoint(str(uri))
    tokens, batch = request.prompt + request.new_tokens, max(request.batches)
    return found, generation_load(found.shape, found.form, batch=batch, tokens=tokens)


def stage_bytes(uri, request, num_layers):
    """Return the memory of a worker that holds so many layers of a model and not one more."""
    _, load = load_of(uri, request)
    return sum(load.stage(num_layers, tables=1).values())


def pools(executor, tmp_path, heard=None, interruption=None):
    """Return a function that makes pools whose journal tells ``heard``."""
    listener = [].append if heard is None else heard.append
    journal = Journal(Directory(str(tmp_path / "events")), listener)

    def make(number):
        pool = Pool(executor, SETUP, num_workers=number, journal=journal)
        pool.interruption = interruption or pool.interruption
        return pool

    return make


def generated_by_stages(uri, ids, cuts):
    """Return the ids that a chain of stages generates after a prompt."""
    found = Checkpoint(str(uri))
    _, load = load_of(uri, request_of(uri))
    whole = fewest_stages(found.shape, load, num_workers=1, worker_bytes=2**40)
    (stage,) = whole
    parts = [(0, cuts[0]), *zip(cuts, [*cuts[1:], stage.last], strict=True)] if cuts else [(0, 3)]
    stages = [
        type(stage)(first=a, last=b, embedding=a == 0, head=b == stage.last) for a, b in parts
    ]
    chain = []
    for assignment in assignments(
        stages, run_uri=str(uri), checkpoint_uri=str(uri), family=found.shape.family,
        dtype=found.shape.dtype,
    ):  # fmt: skip
        chain.append(Stage(SETUP))
        chain[-1].load(assignment)
    passing, tokens = pack(ids), []
    for number in range(NEW_TOKENS):
        start = 0 if number == 0 else ids.shape[1] + number - 1
        for each in chain:
            _, passing = each.generate(passing, start)
        tokens.append(unpack(passing, device="cpu"))
    return torch.cat(tokens, dim=1)


def expected_of(folder, ids):
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=True, local_files_only=True
    ).eval()
    made = loaded.generate(
        ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
        eos_token_id=None, attention_mask=torch.ones_like(ids),
    )  # fmt: skip
    return made[:, ids.shape[1] :]


def prompts():
    return torch.randint(0, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("cuts", [[], [1], [1, 2]], ids=["one stage", "two", "three"])
def test_stages_generate_what_transformers_generates(model, cuts):
    found = generated_by_stages(model, prompts(), cuts)
    assert torch.equal(found, expected_of(model, prompts()))


@pytest.mark.parametrize("method", SIZES)
def test_stages_generate_what_a_compressed_model_generates(method, model, tmp_path):
    compress_local(model, tmp_path, method=method, **SIZES[method])
    found = generated_by_stages(tmp_path / "model", prompts(), [2])
    assert torch.equal(found, expected_of(tmp_path / "model", prompts()))


def test_a_tied_model_generates_through_stages(tmp_path):
    tied = save_model(tmp_path, tie_word_embeddings=True)
    assert torch.equal(generated_by_stages(tied, prompts(), [1]), expected_of(tied, prompts()))


def test_a_new_prompt_begins_anew(model):
    stage = Stage(SETUP)
    (whole,) = fewest_stages(*load_arguments(model), num_workers=1, worker_bytes=2**40)
    (assignment,) = assignments(
        [whole], run_uri=str(model), checkpoint_uri=str(model), family="llama", dtype="float32"
    )
    stage.load(assignment)
    ids = pack(prompts())
    _, first = stage.generate(ids, 0)
    stage.generate(first, prompts().shape[1])
    _, again = stage.generate(ids, 0)
    assert (again.buffer == first.buffer).all()


def load_arguments(uri):
    found, load = load_of(uri, request_of(uri))
    return found.shape, load


def test_as_few_workers_as_hold_the_model(model):
    shape, load = load_arguments(model)
    request = request_of(model)
    for num_layers, expected in ((1, 3), (2, 2)):
        memory = stage_bytes(model, request, num_layers)
        found = fewest_stages(shape, load, num_workers=8, worker_bytes=memory)
        assert len(found) == expected
        assert [stage.first for stage in found[1:]] == [stage.last for stage in found[:-1]]
        assert max(sum(stage.bytes.values()) for stage in found) <= memory
    assert (
        len(fewest_stages(shape, load, num_workers=8, worker_bytes=whole_bytes(shape, load))) == 1
    )
    assert fewest_stages(shape, load, num_workers=8, worker_bytes=LIBRARIES) == ()


def test_models_are_timed_one_after_the_other_over_stages(model, tmp_path):
    small = save_model(tmp_path / "small", num_hidden_layers=2)
    request = request_of(model, small)
    workers = Workers(number=3, bytes=stage_bytes(model, request, 1))
    assert batch_that_fits(request, workers, most=2) == 0
    done = through_stages(request, workers, pools(LocalExecutor(), tmp_path))
    assert isinstance(done, UnitDone)
    rows = {uri: found["settings"] for uri, found in done.values.items()}
    assert {uri: row["stages"] for uri, (row,) in rows.items()} == {str(model): 3, str(small): 2}
    for uri, (found,) in rows.items():
        assert len(found["rounds"]) == request.max_rounds
        assert min(*found["rounds"][0], *found["rounds"][1]) > 0
        weights = Checkpoint(uri).total_bytes
        assert weights <= found["peak_bytes"] < weights + 3 * LIBRARIES
    json.dumps(dict(done.values))  # it becomes a record


def test_a_model_that_all_workers_do_not_hold_is_not_timed(model, tmp_path):
    small = save_model(tmp_path / "small", num_hidden_layers=2)
    request = request_of(model, small)
    workers = Workers(number=2, bytes=stage_bytes(model, request, 1))
    found = through_stages(request, workers, pools(LocalExecutor(), tmp_path)).values
    (large,), (other,) = (found[str(uri)]["settings"] for uri in (model, small))
    assert set(large) == {"batch", "mode", "not_measured"}
    assert "in total; 2 workers of" in large["not_measured"]
    assert other["stages"] == 2


def test_a_batch_that_no_workers_hold_is_left_out_and_smaller_ones_are_timed(model, tmp_path):
    workers = Workers(number=2, bytes=stage_bytes(model, request_of(model), 2))
    request = request_of(model, batches=(1, 2, 4096))
    found = through_stages(request, workers, pools(LocalExecutor(), tmp_path)).values[str(model)]
    assert [row["batch"] for row in found["settings"]] == [1, 2, 4096]
    assert ["not_measured" in row for row in found["settings"]] == [False, False, True]


class LosingExecutor(LocalExecutor):
    """Loses the workers of some calls, counted over all ``generate`` calls; then goes on."""

    def __init__(self, losses):
        self._losses, self._calls, self.gone = set(losses), 0, WeakSet()

    def call(self, handle, method, *args, num_returns=1, label):
        if method == "generate":
            self._calls += 1
            if self._calls in self._losses or handle in self.gone:
                self.gone.add(handle)
                args = ()
                handle = Lost()
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class Lost:
    def generate(self):
        raise WorkerLost(FailureClass.PREEMPTED, "gone")


@pytest.mark.parametrize("losses", [[1], [2], [9], [4, 30]])
def test_a_lost_worker_is_replaced_and_the_model_is_timed_again(losses, model, tmp_path):
    request, heard = request_of(model), []
    workers = Workers(number=2, bytes=stage_bytes(model, request, 2))
    executor = LosingExecutor(losses)
    done = through_stages(request, workers, pools(executor, tmp_path, heard))
    assert done.values[str(model)]["settings"][0]["stages"] == 2
    assert [event["kind"] for event in heard].count("preempted") == len(losses)


def test_workers_that_are_lost_again_and_again_end_it(model, tmp_path):
    request = request_of(model)
    workers = Workers(number=2, bytes=stage_bytes(model, request, 2))
    with pytest.raises(ClusterError):
        through_stages(request, workers, pools(LosingExecutor(range(10**4)), tmp_path))


def test_ctrl_c_ends_it_at_once(model, tmp_path):
    request, interruption = request_of(model), Interruption()
    interruption.requested = True
    workers = Workers(number=2, bytes=stage_bytes(model, request, 2))
    with pytest.raises(KeyboardInterrupt):
        through_stages(
            request, workers, pools(LocalExecutor(), tmp_path, interruption=interruption)
        )


def test_a_broken_weight_is_named(model, tmp_path):
    broken = save_model(tmp_path / "broken")
    file = broken / "model.safetensors"
    held = bytearray(file.read_bytes())
    held[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    file.write_bytes(held)
    request = request_of(broken)
    workers = Workers(number=2, bytes=stage_bytes(model, request, 2))
    with pytest.raises(ModelError, match="NaN"):
        through_stages(request, workers, pools(LocalExecutor(), tmp_path))


def test_a_run_whose_models_fit_no_worker_says_over_how_many_they_went(model, tmp_path):
    # What a run asks of this model.
    request = request_of(model, batches=BATCHES, prompt=32, new_tokens=8)
    memory = (stage_bytes(model, request, 1) + 0.5) / 2**30
    report = run_local(model, tmp_path, slice=0.25, workers=3, worker_gib=memory)
    assert report["verdict"] == "READY"
    dense, compressed = (report["throughput"][side] for side in ("dense", "compressed"))
    assert dense["stages"] == 3
    assert compressed["stages"] in (2, 3)
    assert "over 3 workers" in summary.throughput_note(report).replace("\u00a0", " ")


def test_a_run_whose_models_do_not_fit_all_workers_says_that_they_were_not_timed(model, tmp_path):
    report = run_local(
        model, tmp_path, slice=0.25, workers=1, worker_gib=worker_gib(model, num_layers=1)
    )
    assert report["verdict"] == "READY"
    assert "in total" in report["throughput"]["dense"]["not_measured"]
    assert "The dense model was not timed" in summary.throughput_note(report)


def bench(*arguments):
    """Run ``bench`` on tiny models in a process of its own: it starts a Ray, as other tests do."""
    sizes = ("--prompt", 5, "--new-tokens", NEW_TOKENS, "--batch", 2)
    command = [sys.executable, "-m", "orchestrator", "bench", *map(str, (*arguments, *sizes))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.mark.ray
@pytest.mark.nightly  # five processes; the rows are those of through_stages above
def test_bench_times_models_side_by_side_over_workers(model, tmp_path):
    small = save_model(tmp_path / "small", num_hidden_layers=2)
    memory = (stage_bytes(model, request_of(model), 1) + 0.5) / 2**30
    done = bench(model, small, "--workers", 3, "--worker-gib", memory, "--json")
    found = json.loads(done.stdout)["models"]
    stages = {uri: [row["stages"] for row in each["settings"]] for uri, each in found.items()}
    assert stages == {str(model): [3], str(small): [2]}
    assert all(each["decode_tokens_per_second"] > 0 for each in found.values())


@pytest.mark.parametrize("batches", [(2,), (1, 2)])
def test_bench_has_a_row_for_each_model_and_batch(batches, model, tmp_path, monkeypatch):
    """In this process, where a Ray would be started."""
    monkeypatch.setattr(inspect, "BENCH_SECONDS", 0.1)
    monkeypatch.setattr(inspect, "RayExecutor", LocalExecutor)
    monkeypatch.setattr(ray_cluster, "connected", lambda *_, **__: contextlib.nullcontext())
    small = save_model(tmp_path / "small", num_hidden_layers=2)
    memory = (stage_bytes(model, request_of(model), 1) + 0.5) / 2**30
    sizes = [str(word) for batch in batches for word in ("--batch", batch)]
    given = ["bench", str(model), str(small), "--workers", "3", "--worker-gib", str(memory),
             "--prompt", "5", "--new-tokens", "6", *sizes, "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, given, catch_exceptions=False)
    found = json.loads(done.stdout)
    settings = {uri: each["settings"] for uri, each in found["models"].items()}
    assert list(settings) == [str(model), str(small)]
    for rows in settings.values():
        assert [row["batch"] for row in rows] == list(batches)
    assert all(row["decode_tokens_per_second"] > 0 for rows in settings.values() for row in rows)
    (compared,) = found["comparisons"].values()
    assert [(each["batch"], each["part"]) for each in compared] == [
        (batch, part) for batch in batches for part in ("prefill", "decode")
    ]


@pytest.mark.ray
@pytest.mark.nightly
def test_bench_says_how_a_model_that_does_not_fit_would(model, tmp_path):
    small = save_model(tmp_path / "small", num_hidden_layers=2)
    memory = (stage_bytes(model, request_of(model), 1) + 0.5) / 2**30
    done = bench(model, small, "--workers", 2, "--worker-gib", memory)
    said = done.stdout + done.stderr
    assert f"{model}, batch 2, eager: not measured: generation needs" in said
    assert "use more --workers" in said


@pytest.mark.parametrize(
    "words", [["--batch", "0"], ["--prompt", "0"], ["--new-tokens", "-1"], ["--threads", "0"]]
)
def test_bench_refuses_sizes_that_are_none(words, model):
    said = CliRunner().invoke(cli, ["bench", str(model), *words])
    assert said.exit_code == 2
    assert words[0] in said.output
