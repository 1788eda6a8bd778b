"""What cannot be compressed is refused at the start, by the key or with the reason."""

import json

import pytest
from click.testing import CliRunner

from actors import methods
from actors.storage.checkpoint import Checkpoint
from orchestrator.cli.main import cli
from orchestrator.prepare.support import supported
from orchestrator.recipe.method_options import resolve_options
from planners.batching import TokenBatching
from planners.errors import ModelError, PlanError
from planners.families import example_shape, family_of
from planners.method import Target
from planners.planning import Workload, make_plan
from tests.families.tiny import MODEL_TYPES, config_of, model_of

NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
REFUSED = {
    "norms behind the additions": ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    "an embedding narrower than the stream": ("opt", {"word_embed_proj_dim": 16}, "word_embed"),
    "no final norm": ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    "norms of q and k in phi": ("phi", {"qk_layernorm": True}, "qk_layernorm"),
    "norms of q and k in cohere": ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
    "rope by type of layer": ("qwen3", {"rope_parameters": NESTED}, "rope_parameters.*full_att"),
    "rope of a part of a head": ("granite", {"partial_rotary_factor": 0.5}, "partial_rotary"),
    "rope of an odd part": ("phi", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "partial_"),
    "an unknown activation": ("gemma", {"hidden_act": "prelu"}, "hidden_act"),
    "an odd list of layers": ("smollm3", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    "a list of other length": ("ministral", {"layer_types": ["full_attention"]}, "layer_types"),
    "heads of another width": ("helium", {"head_dim": 16}, "hidden_size"),
    "a multiplier of zero": ("granite", {"residual_multiplier": 0}, "residual_multiplier"),
    "quantised weights": ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
}


@pytest.mark.parametrize(("model_type", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_a_config_that_is_not_understood_is_refused_by_its_key(model_type, changes, words):
    config = {**config_of(model_type).to_dict(), **changes}
    with pytest.raises(ModelError, match=words):
        family_of(model_type).shape_of(config, "float32")


@pytest.mark.parametrize(
    ("model_type", "changes", "tensor"),
    [
        ("opt", {"enable_bias": False}, r"bias"),
        ("seed_oss", {"attention_out_bias": False}, r"o_proj\.bias"),
        ("starcoder2", {"use_bias": False}, r"bias"),
        ("gemma", {"head_dim": 4}, r"q_proj\.weight"),
    ],
)
def test_a_config_that_contradicts_its_tensors_is_refused(model_type, changes, tensor, tmp_path):
    model_of(config_of(model_type)).float().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match=tensor):
        _ = Checkpoint(str(tmp_path)).shape


WORK = Workload(
    batching=TokenBatching(
        sequences=4, sequence_length=16, microbatch_sequences=2, dtype="float32"
    ),
    num_workers=1, worker_bytes=2**40,
)  # fmt: skip


def planned(model_type, name, **options):
    specs = [methods.spec(each) for each in methods.available()]
    spec = methods.spec(name)
    others = [(each, resolve_options(each, {})) for each in specs if each.name != name]
    return make_plan(
        example_shape(model_type),
        spec,
        resolve_options(spec, options),
        target=Target(keep_fraction=0.8),
        work=WORK,
        others=others,
    )


def test_a_module_without_a_group_is_left_by_default_and_refused_by_name():
    plan = planned("qwen3", "modegpt", allocation="uniform")
    assert {layer.qk_head_dim for layer in plan.form.layers} == {16}
    with pytest.raises(PlanError, match="modules has qk: q and k are normalised") as caught:
        planned("qwen3", "modegpt", allocation="uniform", modules="mlp,qk")
    assert caught.value.hint == "methods that do: basis_sharing, deltallm, gptq, slicegpt, svdllm"


@pytest.mark.parametrize(
    ("model_type", "name", "options", "words"),
    [
        ("opt", "slicegpt", {"rotation": "shared"}, "no config of model type opt"),
        ("gemma", "slicegpt", {"rotation": "shared"}, "no config of model type gemma"),
        ("phi", "slicegpt", {"schedule": "sequential"}, "choose schedule=dense"),
        ("opt", "slicegpt", {"schedule": "sequential"}, "choose schedule=dense"),
        ("cohere", "slicegpt", {"head_shortcut": True}, "needs RMS norms"),
        ("llama", "slicegpt", {"head_shortcut": True}, "the head of this model is not"),
        ("phi", "modegpt", {"refit": True}, "refit=true needs layers"),
    ],
)
def test_an_option_that_a_family_does_not_allow_is_refused(model_type, name, options, words):
    with pytest.raises(PlanError, match=words):
        planned(model_type, name, **options)


def test_the_table_of_families_has_every_type_and_the_reasons():
    done = CliRunner().invoke(cli, ["families", "--json"], catch_exceptions=False)
    rows = json.loads(done.stdout)["families"]
    assert sorted(row["model_type"] for row in rows) == sorted(MODEL_TYPES)
    assert rows == supported([methods.spec(name) for name in methods.available()])
    (qwen3,) = (row for row in rows if row["model_type"] == "qwen3")
    assert qwen3["methods"]["modegpt"]["modules"] == ["mlp", "vo"]
    assert list(qwen3["methods"]["modegpt"]["left"]) == ["qk"]
    shown = CliRunner().invoke(cli, ["families"], catch_exceptions=False).stdout
    assert ") q and k are normalised over the channels that would be removed" in shown
