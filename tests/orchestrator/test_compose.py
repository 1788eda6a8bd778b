"""Several methods in one run: the same as each done by hand on what the one before has left."""

import json
import multiprocessing
import os
import signal

import pytest
import torch

from actors import methods
from actors.numerics.packed import packed
from actors.statistics.rotate import rotated_sums
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_records
from actors.storage.tensors import read_tensors
from orchestrator.backend.local import LocalExecutor
from orchestrator.cli.status import status
from orchestrator.experiments.sweep import Wanted, points_of
from orchestrator.phases import earlier_steps
from orchestrator.phases.open_run import open_run, require_same
from orchestrator.prepare.prepare import prepare
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on
from orchestrator.rundir.finished import finished_report
from orchestrator.rundir.layout import HALF_WRITTEN
from planners.errors import ConfigError, PlanError
from planners.model.cost import dense_model_form
from planners.model.form import model_form_from_json
from tests.builders import (
    LENGTH,
    VOCABULARY,
    DeadDriverError,
    compress_local,
    layer_file,
    logits_of,
    perplexity,
    prepared_run,
    result_files,
    run_local,
    save_model,
)
from tests.by_hand import dense_model, observed, parameters_of, step_by_hand, sums_of

PROBE = {"probe_tokens": 100}


def step(method, size, **options):
    key = "slice" if method == "slicegpt" and size in (0.0, 0.25) else "keep_fraction"
    return {"method": method, key: size, "options": options}


RECIPES = {
    "modegpt then slicegpt": [
        step("modegpt", 0.9, modules="mlp,vo", **PROBE),
        step("slicegpt", 0.25),
    ],
    "slicegpt then modegpt": [
        step("slicegpt", 0.25),
        step("modegpt", 0.8, modules="mlp,vo", **PROBE),
    ],
    "svdllm then modegpt": [
        step("svdllm", 0.95, modules="q_proj,k_proj", allocation="by_type"),
        step("modegpt", 0.85, modules="mlp", allocation="influence"),
    ],
    "modegpt then svdllm": [
        step("modegpt", 0.9, modules="qk,mlp", allocation="uniform"),
        step("svdllm", 0.85, modules="v_proj,o_proj"),
    ],
    "three": [
        step("modegpt", 0.95, modules="qk", allocation="uniform"),
        step("svdllm", 0.9, modules="v_proj,o_proj,down_proj"),
        step("slicegpt", 0.75, round_to=1),
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), model_type="qwen2")


@pytest.fixture(scope="module")
def composed(model, tmp_path_factory):
    """Return a function that gives the directory of a recipe's run, done once."""
    done = {}

    def of(name):
        if name not in done:
            done[name] = tmp_path_factory.mktemp("composed")
            compress_local(model, done[name], steps=RECIPES[name])
        return done[name]

    return of


def calibration_ids(model):
    return read_tensors(Directory(str(model / "tokens")), "calibration.safetensors")["input_ids"]


def some_ids(seed=1):
    return torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


def step_directories(out):
    """Return the directories of the steps in order, the run itself last."""
    return [*sorted((out / "steps").iterdir()), out]


def records_of(folder):
    return read_records(Directory(str(folder)))


def forms_of(out):
    return [
        model_form_from_json(records_of(folder)["step"].values["form"])
        for folder in step_directories(out)
    ]


def relative(found, expected):
    expected = packed(expected) if found.ndim < expected.ndim else expected  # a gram as it is kept
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("name", RECIPES)
def test_a_composition_is_its_steps_done_by_hand_one_after_the_other(composed, model, name):
    out, ids = composed(name), calibration_ids(model)
    before = Checkpoint(str(model))
    start = dense_model_form(before.shape)
    found = dense_model(model)
    dense_count = parameters_of(found, tied=before.shape.tied)
    sizes = [records_of(folder)["step"].values["found"] for folder in step_directories(out)]
    for recipe, form, said in zip(RECIPES[name], forms_of(out), sizes, strict=True):
        found, _ = step_by_hand(found, model, recipe, start=start, form=form, ids=ids)
        start, count = form, parameters_of(found, tied=form.tied)
        assert said["parameters"] == count
        assert count <= recipe.get("keep_fraction", 2) * dense_count + 1e-6
        assert count > (recipe.get("keep_fraction", 0) - 0.07) * dense_count
    logits = logits_of(out / "model", some_ids(), trust_remote_code=True)
    with torch.inference_mode():
        expected = found(some_ids()).logits.float()
    assert relative(logits, expected) < 1e-4
    assert relative(logits, dense_model(model)(some_ids()).logits.float()) > 1e-2


@pytest.mark.parametrize("name", RECIPES)
def test_what_inner_steps_made_is_gone_when_the_last_is_done(composed, name):
    left = {p.parts[-2] for p in (composed(name) / "steps").rglob("*.safetensors")}
    assert left == set()


def test_steps_that_remove_nothing_change_nothing(model, tmp_path):
    said = told(model, tmp_path, [
        step("modegpt", 1.0, modules="mlp", **PROBE),
        step("svdllm", 1.0, modules="q_proj,k_proj"),
        step("slicegpt", 0.0),
    ])  # fmt: skip
    idle = [words for words in said if words.startswith("removes nothing")]
    reused = [words for words in said if words.startswith("reuses the existing statistics")]
    assert (len(idle), len(reused)) == (2, len(said) - 3), said
    logits = logits_of(tmp_path / "model", some_ids(), trust_remote_code=True)
    assert relative(logits, logits_of(model, some_ids())) < 1e-4


def told(model, out, steps, **how):
    """Do a run and return what it said of its steps."""
    said = []

    def listen(event):
        if event["kind"] == "step":
            said.append(event["detail"])

    compress_local(model, out, steps=steps, listener=listen, **how)
    return said


def test_behind_a_pure_rotation_statistics_are_turned_and_not_measured_again(model, tmp_path):
    steps = [step("slicegpt", 0.0), step("modegpt", 0.8, **PROBE)]
    said = told(model, tmp_path, steps, keep_statistics=True)
    assert "only rotated the residual stream" in said[1]
    records = records_of(tmp_path)
    assert "carried-layer-00000" in records
    assert "statistics-layer-00000" not in records
    # Measured again, by hooks on the turned model itself.
    start = dense_model_form(Checkpoint(str(model)).shape)
    form = model_form_from_json(records_of(tmp_path / "steps/1-slicegpt")["step"].values["form"])
    ids = calibration_ids(model)
    rotated, _ = step_by_hand(dense_model(model), model, steps[0], start=start, form=form, ids=ids)
    for index, taps in enumerate(observed(rotated, ids)):
        expected = sums_of(taps, form.layers[index])
        found = read_tensors(Directory(str(tmp_path)), f"stats/layer-{index:05d}.safetensors")
        for name in ("mlp_hidden.gram", "v.head_gram", "q_rope.pair_energy", "resid_mlp.gram"):
            assert relative(found[name], expected[name]) < 1e-6
        probe = taps["probe"][: len(found["probe"])]
        assert relative(found["probe"].abs(), probe.float().abs()) < 1e-3  # signs of axes are free


HALVES = """
from planners.method import MethodSpec
from planners.model.taps import Statistic


class METHOD:
    @staticmethod
    def compress(weights, sums, *, shape, form, options):
        return {**weights, "down_proj.weight": weights["down_proj.weight"] / 2}, {}


SPEC = MethodSpec(
    name="halves", revision=1, source="none", modules=("mlp",), residual=False, options=(),
    statistics=lambda shape, options: frozenset({Statistic("mlp_in", "gram")}),
    refuses=lambda shape, options: "", form=lambda shape, start, target, options: start.form,
)
"""


def test_a_step_that_changes_numbers_alone_is_a_step(model, tmp_path, monkeypatch):
    (tmp_path / "halves.py").write_text(HALVES)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    last = step("modegpt", 0.95, modules="vo", allocation="uniform")
    compress_local(model, tmp_path / "run", steps=[step("halves", 1.0), last])
    name = "model.layers.1.mlp.down_proj.weight"
    halved, dense = (
        Checkpoint(str(folder)).read(name) for folder in (tmp_path / "run/model", model)
    )
    assert torch.equal(halved, dense / 2)


def test_a_step_that_does_nothing_says_so(model, tmp_path):
    first = step("modegpt", 1.0, modules="mlp", allocation="uniform")
    last = step("modegpt", 0.95, modules="vo", allocation="uniform")
    said = told(model, tmp_path, [first, last])
    assert said[1] == "removes nothing and writes nothing: its result is its input"
    assert "step 1, modegpt, removed nothing" in said[2]
    assert records_of(tmp_path / "steps/1-modegpt")["step"].values["found"]["idle"] is True


def test_turned_sums_are_those_of_the_turned_model(model):
    shape = Checkpoint(str(model)).shape
    start, ids = dense_model_form(shape), calibration_ids(model)
    dense = dense_model(model)
    form = prepared_run(model, model / "unused", steps=[step("slicegpt", 0.0)]).plan.form
    rotated, bases = step_by_hand(
        dense, model, step("slicegpt", 0.0), start=start, form=form, ids=ids
    )
    pairs = zip(observed(dense, ids), observed(rotated, ids), strict=True)
    for index, (old, new) in enumerate(pairs):
        layer = dense.model.layers[index]
        scales = {
            "attn_norm": layer.input_layernorm.weight,
            "mlp_norm": layer.post_attention_layernorm.weight,
        }
        sums = {**sums_of(old, start.layers[index]), "probe": old["probe"]}
        found = rotated_sums(sums, tuple(bases[2 * index : 2 * index + 3]), scales=scales)
        expected = {**sums_of(new, form.layers[index]), "probe": new["probe"]}
        assert found.keys() == expected.keys()
        for name in found.keys() - {"num_tokens"}:
            assert relative(found[name].detach(), expected[name]) < 1e-6, name


def test_a_last_basis_of_a_stock_model_may_be_followed_by_a_modular_step(model, tmp_path):
    steps = [step("slicegpt", 0.9, rotation="shared"), step("modegpt", 0.8, **PROBE)]
    compress_local(model, tmp_path, steps=steps)
    kept = records_of(tmp_path)["step"].values["found"]["keep_fraction"]
    assert 0.7 < kept <= 0.8
    assert perplexity(tmp_path, "compressed") < 2 * perplexity(tmp_path, "dense")


def test_a_refit_behind_another_step_refits_to_the_model_it_began_with(model, tmp_path):
    steps = [
        step("slicegpt", 0.25),
        step("modegpt", 0.7, modules="mlp,vo", allocation="uniform", refit=True),
    ]
    compress_local(model, tmp_path, steps=steps)
    losses = records_of(tmp_path)["refit-losses"].values["nats"]
    assert losses["dense"] > 0
    rests = [
        records_of(tmp_path)[f"refit-layer-{i:05d}"].values["linears"][half]
        for i in range(3)
        for half in ("o_proj", "down_proj")
    ]
    assert all(rest["rest_after"] <= rest["rest_before"] for rest in rests)
    assert any(rest["rest_after"] < 0.99 * rest["rest_before"] for rest in rests)


DURABLE = ("statistics", "damage", "losses", "basis", "layer", "embedding", "head", "stitch",
           "carried")  # fmt: skip


@pytest.mark.parametrize("name", ["svdllm then modegpt", "turned"])
def test_a_driver_that_dies_after_every_unit_leaves_the_same_bytes(model, tmp_path, name):
    recipes = RECIPES | {"turned": [step("slicegpt", 0.0), step("modegpt", 0.8, modules="mlp",
                                                                allocation="uniform")]}  # fmt: skip
    compress_local(model, tmp_path / "at once", steps=recipes[name])
    deaths = 0

    def die(event):
        if event["kind"] in DURABLE:
            raise DeadDriverError

    while True:
        try:
            compress_local_or_die(model, tmp_path / "dying", recipes[name], die)
        except DeadDriverError:
            deaths += 1
            assert deaths < 100
        else:
            break
    assert deaths > 20
    assert result_files(tmp_path / "dying") == result_files(tmp_path / "at once")


def compress_local_or_die(model, out, steps, listener):
    """As `compress_local`, and say so where the driver died before verification."""
    reached = []

    def listen(event):
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            reached.append(event)
        listener(event)

    compress_local(model, out, steps=steps, listener=listen)
    if not reached:
        raise DeadDriverError


def test_a_driver_that_dies_while_it_drops_a_step_is_followed_by_one_that_ends(
    composed, model, tmp_path, monkeypatch
):
    name = "three"
    drop = earlier_steps._drop

    def half(prepared):
        for file in prepared.run.names("model")[:2]:
            prepared.run.delete(file)
        raise DeadDriverError

    for _ in range(2):
        monkeypatch.setattr(earlier_steps, "_drop", half)
        compress_local(model, tmp_path, steps=RECIPES[name])
    monkeypatch.setattr(earlier_steps, "_drop", drop)
    compress_local(model, tmp_path, steps=RECIPES[name])
    assert result_files(tmp_path) == result_files(composed(name))


def killed(model, out, steps):
    def listen(event):
        if event["kind"] == "layer" and (out / "steps/1-modegpt/records/step.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    compress_local(model, out, steps=steps, listener=listen)


def test_a_killed_process_is_followed_by_one_that_leaves_the_same_bytes(composed, model, tmp_path):
    name = "modegpt then slicegpt"
    process = multiprocessing.get_context("spawn").Process(
        target=killed, args=(model, tmp_path, RECIPES[name])
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "model/config.json").exists()
    compress_local(model, tmp_path, steps=RECIPES[name])
    # A file that was being written when the process was killed is removed at READY.
    found = {n: d for n, d in result_files(tmp_path).items() if not n.endswith(HALF_WRITTEN)}
    assert found == result_files(composed(name))


def test_a_result_that_lost_a_file_is_made_whole_though_its_steps_are_gone(
    composed, model, tmp_path
):
    name = "modegpt then svdllm"
    compress_local(model, tmp_path, steps=RECIPES[name])
    whole = result_files(tmp_path)
    layer_file(tmp_path / "model", 1).unlink()
    for file in (tmp_path / "stats").iterdir():
        file.unlink()
    compress_local(model, tmp_path, steps=RECIPES[name])
    assert result_files(tmp_path) == whole == result_files(composed(name))


def test_workers_change_no_bit_of_a_composition(composed, model, tmp_path):
    name = "slicegpt then modegpt"
    compress_local(model, tmp_path, steps=RECIPES[name], workers=3)
    assert result_files(tmp_path) == result_files(composed(name))


def test_the_report_has_every_step_and_a_finished_run_is_left_alone(model, tmp_path, capsys):
    steps = RECIPES["modegpt then svdllm"]
    report = run_local(model, tmp_path, steps=steps, keep_statistics=True)
    assert report["verdict"] == "READY"
    found = report["method"]["steps"]
    assert [s["name"] for s in found] == ["modegpt", "svdllm"]
    assert found[0]["modules"] == ["qk", "mlp"]
    assert found[0]["options"]["allocation"] == "uniform"
    assert [s["statistics"] for s in found] == ["measured", "measured"]
    assert "modegpt, changed" in found[1]["because"]
    before, after = (report["parameters"][key] for key in ("before", "after"))
    assert before == parameters_of(dense_model(model), tied=Checkpoint(str(model)).shape.tied)
    assert found[0]["parameters"] > found[1]["parameters"] == after
    assert found[0]["keep_fraction"] <= 0.9
    assert report["model"]["revision"] == Checkpoint(str(model)).revision
    assert {"mlp", "v_proj"} <= report["layers"][0]["errors"].keys()
    assert "steps" in report["recipe"]
    assert "method" not in report["recipe"]
    card = (tmp_path / "model/README.md").read_text()
    assert "1. modegpt, keep_fraction 0.9" in card
    assert "2. svdllm, keep_fraction 0.85" in card
    assert finished_report(Directory(str(tmp_path))) == json.loads(
        (tmp_path / "report.json").read_text()
    )
    status(str(tmp_path), json_=True)
    said = json.loads(capsys.readouterr().out)
    assert [s["method"] for s in said["steps"]] == ["modegpt", "svdllm"]
    # The same recipe, as it was written, is the same run.
    again = load_config(str(tmp_path / "run.yaml"), {})
    assert [s.method for s in again.steps] == ["modegpt", "svdllm"]
    kept = prepared_run(model, tmp_path / "other", method="svdllm", keep_fraction=0.9,
                        stats=str(tmp_path / "steps/1-modegpt"))  # fmt: skip
    require_same(kept)
    alien = [step("modegpt", 0.9, modules="mlp", **PROBE), step("slicegpt", 0.25)]
    with pytest.raises(ConfigError, match="calibration data"):
        require_same(prepared_run(model, tmp_path / "other", steps=alien,
                                  calibration={"sequences": 3},
                                  stats=str(tmp_path / "steps/1-modegpt")))  # fmt: skip
    with pytest.raises(ConfigError, match="several steps") as caught:
        require_same(prepared_run(model, tmp_path / "other", stats=str(tmp_path)))
    assert caught.value.hint.endswith("steps/1-modegpt")
    with pytest.raises(ConfigError, match="several steps"):
        points_of(
            prepared_run(model, tmp_path, steps=steps),
            Wanted(names=["svdllm"], sizes=[("keep_fraction", 0.8)]),
        )


REFUSED = {
    "steps[1]: svdllm shrinks": [step("modegpt", 0.9), step("svdllm", 0.8)],
    "steps[2]: modegpt shrinks mlp, qk, vo, and steps[0], svdllm, shrinks": [
        step("svdllm", 0.9, modules="q_proj"), step("slicegpt", 0.8), step("modegpt", 0.7),
    ],
    "steps[1]: slicegpt shrinks residual": [step("slicegpt", 0.9), step("slicegpt", 0.8)],
    "steps[1].options.round_to: is -1": [step("modegpt", 0.9), step("slicegpt", 0.8, round_to=-1)],
    "steps[0].options.rond_to: modegpt has no such": [step("modegpt", 0.9, rond_to=1)],
    "steps[1].method: unknown method 'slicgpt'": [step("modegpt", 0.9), step("slicgpt", 0.8)],
    "steps[1].keep_fraction: is 0.9, more than": [step("slicegpt", 0.8), step("modegpt", 0.9)],
    "steps[0].keep_fraction, slice: give one": [{"method": "slicegpt"}],
    "steps[0].method: is missing": [{"keep_fraction": 0.8}],
    "steps[0].keep_fraction: is 2": [{"method": "slicegpt", "keep_fraction": 2}],
    "steps[0].metod: unknown key": [{"metod": "slicegpt", "keep_fraction": 0.5}],
    "steps[1]: is 'slicegpt'; it must be a mapping": [step("modegpt", 0.9), "slicegpt"],
    "steps: is": [],
    "steps[1]: rotation=shared": [
        step("modegpt", 0.9, modules="mlp"), step("slicegpt", 0.8, rotation="shared"),
    ],
    "steps[1]: servable=native": [
        step("slicegpt", 0.9), step("modegpt", 0.8, servable="native"),
    ],
    "steps[1]: slice: 0.1 is a": [step("slicegpt", 0.9), {"method": "modegpt", "slice": 0.1}],
    "steps[1]: keep_fraction 0.01 cannot be met": [
        step("modegpt", 0.9), step("slicegpt", 0.01),
    ],
    "steps[0]: svdllm does not support this model: modules has x": [
        step("svdllm", 0.9, modules="x")
    ],
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_a_recipe_that_cannot_be_is_refused_at_the_door_with_its_place(model, tmp_path, message):
    with pytest.raises((ConfigError, PlanError)) as caught:
        prepared_run(model, tmp_path, steps=REFUSED[message])
    assert any(line.startswith(message) for line in str(caught.value).splitlines())


@pytest.mark.parametrize("key", ["method", "keep_fraction", "slice", "options"])
def test_steps_leave_no_room_for_the_keys_of_one_method(key):
    value = {"method": "slicegpt", "keep_fraction": 0.8, "slice": 0.1, "options": {}}[key]
    with pytest.raises(ConfigError, match=f"^{key}: cannot be given with steps"):
        load_config(None, {"steps": RECIPES["three"], key: value})


def test_the_embedded_model_stays_useful_behind_two_steps(tmp_path):
    given = {
        "model": "tiny",
        "out": str(tmp_path),
        "steps": [
            step("svdllm", 0.96, modules="q_proj,k_proj"),
            step("modegpt", 0.8, modules="mlp,vo", allocation="uniform"),
        ],
        "calibration.sequences": 24,
        "evaluation.sequences": 12,
        "device": "cpu",
    }
    prepared = prepare(load_config(None, given))
    open_run(prepared)

    def die_before_verifying(event):
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            raise DeadDriverError

    with pytest.raises(DeadDriverError):
        run_on(prepared, LocalExecutor(), listener=die_before_verifying)
    kept = records_of(tmp_path)["step"].values["found"]["keep_fraction"]
    assert 0.79 < kept <= 0.8
    dense, compressed = (perplexity(tmp_path, name) for name in ("dense", "compressed"))
    assert dense < compressed < 2 * dense
