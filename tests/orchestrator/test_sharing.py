"""Results whose layers share tensors: stored once, counted once, loaded by transformers."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.validate import check_classes
from orchestrator.backend.executor import FailureClass, WorkerLost
from orchestrator.backend.local import LocalExecutor
from planners.errors import ConfigError, PlanError
from planners.model.cost import model_parameters
from tests.builders import (
    DeadDriverError,
    DyingDriver,
    compress_local,
    layer_file,
    logits_of,
    prepared_run,
    result_files,
    run_local,
    save_model,
)

LAYERS = 5
BY_HAND = {"layers": "1,4", "rank": 6}
CUTS = {
    "fitted": {"method": "deltallm", "keep_fraction": 0.95, "options": BY_HAND},
    "published": {
        "method": "deltallm",
        "keep_fraction": 0.95,
        "options": {**BY_HAND, "c": "one", "weighted": False, "align": False},
    },
    "one layer twice": {
        "method": "deltallm",
        "keep_fraction": 0.95,
        "options": {"layers": "3", "sources": "1", "rank": 0, "c": "one"},
    },
    "measured": {"method": "deltallm", "keep_fraction": 0.85, "options": {"grid": "0.6,0.3"}},
    "alternating": {
        "method": "deltallm",
        "keep_fraction": 0.96,
        "options": {"layout": "alternating"},
    },
    "basis": {"method": "basis_sharing", "keep_fraction": 0.8},
    "three layers": {"method": "basis_sharing", "keep_fraction": 0.8, "options": {"group": 3}},
    "tucker": {"method": "basis_sharing", "keep_fraction": 0.8, "options": {"form": "tucker"}},
    "cp": {"method": "basis_sharing", "keep_fraction": 0.8, "options": {"form": "cp"}},
}
SAMPLE = ("fitted", "basis", "cp")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, num_hidden_layers=LAYERS, attention_bias=True)


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    found = {}
    for name in SAMPLE:
        out = tmp_path_factory.mktemp(name) / "run"
        compress_local(model, out, **CUTS[name])
        found[name] = result_files(out)
    return found


def some(names=CUTS, few=SAMPLE):
    return [
        name if name in few else pytest.param(name, marks=pytest.mark.nightly) for name in names
    ]


def tensors_of(folder):
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize("cut", some())
def test_shared_tensors_are_stored_and_counted_once_and_load(model, tmp_path, cut):
    report = run_local(model, tmp_path / "run", **CUTS[cut])
    assert report["verdict"] == "READY"  # a process of its own has loaded it, and compared
    folder = tmp_path / "run" / "model"
    stored = tensors_of(folder)
    floats = sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert report["parameters"]["after"] == floats
    kept = CUTS[cut]["keep_fraction"]
    assert report["parameters"]["keep_fraction"] <= kept
    check_classes(Checkpoint(str(folder)))  # as a command does that is given such a model
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert sum(p.numel() for p in loaded.parameters()) == floats
    config = json.loads((folder / "config.json").read_text())
    links = [(i, r, link) for i, f in enumerate(config["layer_forms"])
             for r, link in f.get("links", {}).items()]  # fmt: skip
    assert links
    for index, role, link in links:
        linears = config["layout"]["linears"]
        own, other = (loaded.model.layers[i].get_submodule(linears[role])
                      for i in (index, link["layer"]))  # fmt: skip
        for part in link["parts"]:
            whole = other if part == "source" else getattr(other, part)
            assert getattr(own, part).weight is whole.weight


@pytest.mark.parametrize("cut", ["fitted", "basis"])
def test_a_loaded_result_that_is_saved_again_is_the_same_model(undisturbed, tmp_path, cut):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in undisturbed[cut].items():
        (folder / name).write_bytes(data)
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == tensors_of(folder).keys()
    ids = torch.arange(24).reshape(2, 12)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    expected = logits_of(folder, ids, trust_remote_code=True)
    assert torch.equal(again.eval()(ids).logits, expected)


@pytest.mark.parametrize("cut", some(SAMPLE, ("basis",)))
def test_more_workers_give_the_same_bytes(model, tmp_path, undisturbed, cut):
    compress_local(model, tmp_path / "run", workers=2, **CUTS[cut])
    assert result_files(tmp_path / "run") == undisturbed[cut]


class Losing(LocalExecutor):
    """Loses the worker of one layer of the result, once."""

    def __init__(self, unit):
        self.unit, self.calls = unit, Counter()

    def call(self, handle, method, *args, num_returns=1, label):
        self.calls[label] += 1
        if self.unit in label and sum(n for x, n in self.calls.items() if self.unit in x) == 1:
            handle, method, args = Gone(), "call", ()
        return super().call(handle, method, *args, num_returns=num_returns, label=label)


class Gone:
    def call(self):
        raise WorkerLost(FailureClass.WORKER_CRASHED, "gone")


@pytest.mark.parametrize("cut", some(SAMPLE, ("basis",)))
@pytest.mark.parametrize("layer", [0, 1])
def test_a_lost_worker_changes_no_byte(model, tmp_path, undisturbed, cut, layer):
    executor = Losing(f"layer-{layer:05d}")
    compress_local(model, tmp_path / "run", workers=2, executor=executor, **CUTS[cut])
    assert sum(n for label, n in executor.calls.items() if executor.unit in label) > 1
    assert result_files(tmp_path / "run") == undisturbed[cut]


@pytest.mark.parametrize("cut", some(SAMPLE, ("basis",)))
def test_a_driver_that_died_between_the_layers_of_a_group_changes_no_byte(
    model, tmp_path, undisturbed, cut
):
    with pytest.raises(DeadDriverError):
        run_local(model, tmp_path / "run", listener=DyingDriver("layer", 1), **CUTS[cut])
    compress_local(model, tmp_path / "run", **CUTS[cut])
    assert result_files(tmp_path / "run") == undisturbed[cut]


def test_a_source_is_as_it_was_and_its_taker_has_no_copy(model, undisturbed, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in undisturbed["fitted"].items():
        (folder / name).write_bytes(data)
    before = load_file(model / "model.safetensors")
    for name, tensor in load_file(layer_file(folder, 3)).items():
        assert torch.equal(tensor, before[name])
    names = {name for name in load_file(layer_file(folder, 4)) if "q_proj" in name}
    prefix = "model.layers.4.self_attn.q_proj"
    parts = ("first.weight", "second.weight", "number", "source.bias")
    assert names == {f"{prefix}.{part}" for part in parts}


def test_sources_that_damage_chose_are_as_they_were_and_outputs_are_near(model, tmp_path):
    how = {"method": "deltallm", "keep_fraction": 0.72, "options": {"grid": "0.6,0.3"}}
    compress_local(model, tmp_path / "run", **how)
    stored = Checkpoint(str(tmp_path / "run" / "model"))
    dense = Checkpoint(str(model))
    names = stored.shared
    assert len({name.split(".")[2] for name in names}) > 2  # several layers, of several sources
    for name in names.values():
        assert torch.equal(stored.read(name), dense.read(name))
    for index, form in enumerate(stored.form.layers):
        tensors = stored.read_layer(index)
        errors = read_record(Directory(str(tmp_path / "run")), f"layer-{index:05d}").values[
            "errors"
        ]
        for role in form.links:
            change = tensors[f"{role}.second.weight"] @ tensors[f"{role}.first.weight"]
            source = tensors[f"{role}.source.weight"]
            whole = tensors[f"{role}.number"] * source + change
            # Alignment keeps the size of a matrix, so what is stored is near that of the input.
            before = dense.read_layer(index)[f"{role}.weight"]
            assert whole.norm() <= 1.2 * before.norm()
            assert errors[role] < 1


RECOVER = {"batch": 4, "parts": 2, "tokens": 8 * 4 * 24, "warmup": 2, "held_out": 4,
           "learning_rates": [0.01]}  # fmt: skip


@pytest.mark.parametrize(("mode", "cut"), [("local", "basis"), ("global", "fitted"),
                         *(pytest.param(*p, marks=pytest.mark.nightly) for p in (
                             ("local", "fitted"), ("local", "cp"), ("global", "basis")))],
                         )  # fmt: skip
@pytest.mark.parametrize("trains", ["made", pytest.param("lora", marks=pytest.mark.nightly),
                                    pytest.param("all", marks=pytest.mark.nightly)])  # fmt: skip
def test_a_recovery_trains_a_shared_tensor_once_or_not_at_all(model, tmp_path, mode, cut, trains):
    how = {"mode": mode, "trains": trains, "rank": 2, **RECOVER}
    compress_local(model, tmp_path / "run", **CUTS[cut], recover=how)
    compress_local(model, tmp_path / "plain", **CUTS[cut])
    before, after = (tensors_of(tmp_path / name / "model") for name in ("plain", "run"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if mode == "local" and cut == "basis":  # what another layer takes
        assert not [n for n in changed if "layers.0" in n and "q_proj.first" in n]
    ids = torch.arange(24).reshape(2, 12)
    assert torch.isfinite(logits_of(tmp_path / "run" / "model", ids, trust_remote_code=True)).all()


BAD = {
    "no such layer": ({"layers": "1,9", "rank": 4}, "layers: there is no layer 9; .* 0 to 4"),
    "no such source": ({"layers": "1", "sources": "7", "rank": 4}, "sources: there is no layer 7"),
    "a later source": ({"layers": "1", "sources": "3", "rank": 4}, "layer 3 is not before layer 1"),
    "itself": ({"layers": "1", "sources": "1", "rank": 4}, "layer 1 is not before layer 1"),
    "a change of a change": (
        {"layers": "1,2", "sources": "0,1", "rank": 4},
        "layer 1 is itself a change of another",
    ),
    "nothing before": ({"layers": "0", "rank": 4}, "layer 0 has no earlier layer"),
    "twice": ({"layers": "1,1", "rank": 4}, "names a layer twice"),
    "too few sources": ({"layers": "1,2", "sources": "0", "rank": 4}, "1 are given for 2 layers"),
    "a rank too large": (
        {"layers": "1", "rank": 16},
        "rank: 16 costs more than it saves in q_proj",
    ),
    "no numbers": ({"layers": "one", "rank": 4}, "layers is one; it must be numbers"),
    "sources alone": ({"sources": "0"}, "sources are given without the layers"),
    "a rank for measured layers": ({"rank": 4}, "a rank is given without layers"),
    "unknown linears": ({"modules": "q_prj"}, "modules has q_prj; known: .*did you mean q_proj"),
}


@pytest.mark.parametrize(("options", "said"), BAD.values(), ids=BAD)
def test_what_cannot_be_shared_is_refused_with_the_reason(model, tmp_path, options, said):
    with pytest.raises(PlanError, match=said) as refused:
        prepared_run(model, tmp_path / "run", method="deltallm", keep_fraction=0.95,
                     options=options)  # fmt: skip
    assert "\n" not in str(refused.value)


def test_layers_of_different_kinds_are_refused(tmp_path):
    config = {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}
    mixed = save_model(tmp_path / "model", model_type="smollm3", **config)
    how = {"method": "deltallm", "keep_fraction": 0.98}
    with pytest.raises(PlanError, match="layers 2 and 3 are of different kinds"):
        prepared_run(mixed, tmp_path / "run", **how, options={"layers": "3", "rank": 4})
    with pytest.raises(PlanError, match="its layers are of different kinds"):
        prepared_run(mixed, tmp_path / "run", **how)
    groups = prepared_run(mixed, tmp_path / "run", method="basis_sharing", keep_fraction=0.8)
    assert not groups.plan.form.layers[3].links


@pytest.mark.parametrize("other", ["gptq", "modegpt"])
def test_nothing_else_is_done_to_layers_that_share(model, tmp_path, other):
    size = {} if other == "gptq" else {"keep_fraction": 0.7}
    options = {"bits": 4, "group": 16} if other == "gptq" else {"modules": "mlp"}
    steps = [{"method": "basis_sharing", "keep_fraction": 0.9},
             {"method": other, "options": options, **size}]  # fmt: skip
    with pytest.raises(ConfigError, match=r"steps\[0\]: basis_sharing shares tensors"):
        prepared_run(model, tmp_path / "run", steps=steps)


@pytest.mark.parametrize("cut", CUTS)
def test_the_plan_counts_what_is_stored_once(model, tmp_path, cut):
    plan = prepared_run(model, tmp_path / "run", **CUTS[cut]).plan
    assert model_parameters(plan.shape, plan.form) == plan.parameters_after
    assert plan.parameters_after / plan.parameters_before <= CUTS[cut]["keep_fraction"]
    assert plan.form.shares
