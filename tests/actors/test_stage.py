"""A stage as an object: what it passes on, what it sums, and what it refuses."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.messages import Assignment, Microbatch, UnitTask, WorkerSetup, unpack
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors
from actors.storage.tokens import tokens_to_parquet
from actors.worker.stage import Stage
from planners.errors import ModelError
from planners.model.taps import Statistic
from tests.builders import LENGTH, VOCABULARY, logits_of, save_model

TOKENS = "tokens/t.parquet"
NUM_SEQUENCES, SIZE = 6, 2
GRAMS = frozenset({Statistic("resid_attn", "gram"), Statistic("resid_out", "gram")})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def token_ids():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, VOCABULARY, (NUM_SEQUENCES, LENGTH), generator=generator)


@pytest.fixture
def run(tmp_path):
    directory = Directory(str(tmp_path / "run"))
    directory.write(TOKENS, tokens_to_parquet(token_ids().numpy(), {}))
    return directory


@pytest.fixture
def staged(run, model):
    """Return a function that gives a stage with some of the three layers of the model."""

    def make(first=0, last=3, *, checkpoint=model, **changes):
        setup = WorkerSetup(name="worker-0", incarnation="one", threads=1, device="cpu")
        stage = Stage(setup)
        given = {"statistics": GRAMS, "embedding": first == 0, "head": last == 3, **changes}
        stage.load(
            Assignment(
                run_uri=run.uri, checkpoint_uri=str(checkpoint), family="llama", first=first,
                last=last, dtype="float32", **given,
            )
        )  # fmt: skip
        return stage

    return make


def microbatch(index, **changes):
    rows = (index * SIZE, (index + 1) * SIZE)
    return Microbatch(index=index, tokens=TOKENS, rows=rows, observe=True, **changes)


def published(stage, run, layer):
    name = f"statistics-layer-{layer:05d}"
    stage.publish(UnitTask(unit=name, kind="statistics", index=layer, inputs=()))
    done = stage.written(name)
    assert done.unit == name
    return read_tensors(run, done.files[0].path)


def test_stages_in_a_row_compute_what_one_stage_does(staged):
    whole, parts = staged(), [staged(0, 1), staged(1, 3)]
    _, expected = whole.step(microbatch(0, hand_over=True), None)
    packed = None
    for stage in parts:
        _, packed = stage.step(microbatch(0, hand_over=True), packed)
    assert torch.equal(unpack(packed, device="cpu"), unpack(expected, device="cpu"))


def test_a_boundary_file_is_as_good_as_what_is_handed_over(staged, run):
    first, second = staged(0, 2), staged(2, 3)
    done, packed = first.step(microbatch(0, hand_over=True, write_boundary="boundary/x"), None)
    assert done.boundary.bytes == run.size("boundary/x")
    _, expected = second.step(microbatch(0, hand_over=True), packed)
    _, found = second.step(microbatch(0, hand_over=True, read_boundary="boundary/x"), None)
    assert torch.equal(unpack(found, device="cpu"), unpack(expected, device="cpu"))


def test_the_loss_is_that_of_transformers(staged, model):
    stage = staged(statistics=frozenset())
    steps = [stage.step(microbatch(i, loss=True), None)[0] for i in range(3)]
    nats = math.fsum(step.nats for step in steps)
    assert sum(step.num_predicted for step in steps) == NUM_SEQUENCES * (LENGTH - 1)
    log_p = logits_of(model, token_ids()).double().log_softmax(-1)[:, :-1]
    expected = -log_p.gather(-1, token_ids()[:, 1:, None]).sum()
    assert nats == pytest.approx(float(expected), rel=1e-6)


SEEN_BEFORE = {  # the last tap -> what does not run behind it
    "resid_attn": ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"),
    "v": ("self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"),
    "resid_mlp": ("post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj"),
    "mlp_hidden": ("mlp.down_proj",),
    "resid_out": (),
}


@pytest.mark.parametrize("tap", SEEN_BEFORE)
def test_the_last_layer_goes_no_further_than_the_last_tap_and_sums_the_same(staged, run, tap):
    kind = "head_gram" if tap == "v" else "gram"
    wanted = frozenset({Statistic("resid_attn", "gram"), Statistic(tap, kind)})
    whole, short = staged(statistics=wanted), staged(statistics=wanted)
    ran = []
    for name, module in short._layers[2].named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    for index in range(3):
        whole.step(microbatch(index, hand_over=True), None)  # somebody reads what it puts out
        short.step(microbatch(index), None)
    expected, found = published(whole, run, 2), published(short, run, 2)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert set(SEEN_BEFORE[tap]).isdisjoint(ran)
    assert ("mlp.down_proj" in ran) == (tap == "resid_out")


def test_a_last_layer_that_has_summed_a_microbatch_is_not_run_again_for_nobody(staged):
    stage = staged()
    stage.step(microbatch(0), None)
    ran = []
    stage._layers[2].register_forward_hook(lambda *_: ran.append(1))
    done, packed = stage.step(microbatch(0), None)
    assert (ran, packed, done.num_tokens) == ([], None, SIZE * LENGTH)
    stage.step(microbatch(0, hand_over=True), None)
    assert ran == [1]


def test_a_microbatch_that_comes_again_is_passed_on_and_not_summed_again(staged, run):
    once, twice = staged(), staged()
    for index in range(3):
        once.step(microbatch(index), None)
    expected = published(once, run, 0)
    for index in (0, 1, 0, 1, 1, 2):  # as after a stage behind this one was lost
        _, packed = twice.step(microbatch(index, hand_over=True), None)
        assert packed is not None
    found = published(twice, run, 0)
    assert found["num_tokens"].item() == NUM_SEQUENCES * LENGTH
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_microbatch_that_comes_too_early_is_not_summed(staged, run):
    stage = staged()
    for index in (0, 2, 1, 2):
        stage.step(microbatch(index), None)
    assert published(stage, run, 0)["num_tokens"].item() == NUM_SEQUENCES * LENGTH


def test_a_pass_that_does_not_observe_leaves_no_sums(staged, run):
    stage = staged()
    stage.step(Microbatch(index=0, tokens=TOKENS, rows=(0, 2)), None)
    assert not any(tensor.any() for tensor in published(stage, run, 2).values())


def test_loading_again_forgets_what_was_summed(staged, run, model):
    stage = staged()
    stage.step(microbatch(0), None)
    stage.load(
        Assignment(
            run_uri=run.uri, checkpoint_uri=str(model), family="llama", first=0, last=3,
            embedding=True, head=True, statistics=GRAMS, dtype="float32",
        )
    )  # fmt: skip
    for index in range(3):
        stage.step(microbatch(index), None)
    assert published(stage, run, 1)["num_tokens"].item() == NUM_SEQUENCES * LENGTH


def test_another_pass_of_the_same_contents_takes_the_layers_that_are_there(staged, model):
    found = Checkpoint(str(model)).contents
    stage = staged(statistics=frozenset(), contents=found)
    loaded, given = stage._layers[0], stage._assignment
    stage.load(replace(given))
    assert stage._layers[0] is loaded
    for other in (replace(given, dtype="bfloat16"), replace(given, statistics=GRAMS)):
        stage.load(other)
        assert stage._layers[0] is not loaded
        stage.load(given)
    with pytest.raises(ModelError):
        stage.load(replace(given, contents={**found, "model.norm.weight": "0"}))
    stage.load(given)  # nothing of the failed one was kept
    done, _ = stage.step(microbatch(0, loss=True), None)
    assert done.nats > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_as_it_is_read(staged, model, tmp_path, bad):
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name][3, 4] = bad
    broken = tmp_path / "broken"
    broken.mkdir()
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    staged(2, 3, checkpoint=broken)  # holds no such layer
    with pytest.raises(ModelError, match=f"{name} has 1 entries that are NaN or infinite"):
        staged(0, 2, checkpoint=broken)


def test_tables_that_old_checkpoints_hold_are_left_alone(staged, model, tmp_path):
    tensors = load_file(model / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    old = tmp_path / "old"
    old.mkdir()
    save_file(tensors, old / "model.safetensors")
    (old / "config.json").write_bytes((model / "config.json").read_bytes())
    step = microbatch(0, hand_over=True)
    found, expected = (staged(checkpoint=folder).step(step, None)[1] for folder in (old, model))
    assert torch.equal(unpack(found, device="cpu"), unpack(expected, device="cpu"))


def test_what_a_stage_forgets_is_out_of_memory(staged):
    stage = staged()
    weights = [weakref.ref(p) for layer in stage._layers.values() for p in layer.parameters()]
    assert weights
    stage.drop()
    gc.collect()
    assert not any(weight() is not None for weight in weights)
