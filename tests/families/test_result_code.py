"""The code of a result, of every family, against the stock model with the same weights."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from actors.modeling.halves import HalvedLayer
from actors.modeling.travelling import classes, code_of
from orchestrator.prepare.model_config import result_config, stored
from planners.model.cost import dense_model_form
from planners.model.form import dense_form
from tests.families.tiny import MODEL_TYPES, config_of, ids_of, logits_of, model_of, shape_of

each_model_type = pytest.mark.parametrize("model_type", MODEL_TYPES)


def written_config(config, change=lambda _kind, form: form):
    """Return the config.json of a result whose layers are changed from full width."""
    _, shape = shape_of(config)
    dense = dense_model_form(shape)
    layers = tuple(change(shape.kind(layer), layer) for layer in dense.layers)
    form = replace(dense, layers=layers, native=False)
    return json.loads(json.dumps(stored(result_config(config.to_dict(), shape, form))))


def result_of(config, change=lambda _kind, form: form):
    """Return a random result of such widths, in float64."""
    code = classes(config.model_type)
    kept = {k: v for k, v in written_config(config, change).items() if k != "dtype"}
    torch.manual_seed(3)
    return code.CompressedForCausalLM(code.CompressedConfig(**kept)).double().eval()


def difference(one, other):
    before = logits_of(other, ids_of())
    return float((logits_of(one, ids_of()) - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@each_model_type
def test_a_result_of_full_width_gives_the_logits_of_the_stock_model(model_type, tied):
    config = config_of(model_type, tied=tied)
    dense, result = model_of(config), result_of(config)
    result.load_state_dict(dense.state_dict(), strict=True)
    assert torch.equal(logits_of(result, ids_of()), logits_of(dense, ids_of()))
    assert result.lm_head.weight is not dense.lm_head.weight
    assert (result.lm_head.weight is result.get_input_embeddings().weight) == tied


@each_model_type
def test_shortcuts_that_change_nothing_give_the_logits_of_the_stock_model(model_type):
    config = config_of(model_type)
    dense = model_of(config)
    result = result_of(config, lambda _, form: replace(form, shortcuts=True))
    width = config.hidden_size
    eye = {n: torch.eye(width) for n in result.state_dict() if n.endswith("_shortcut.weight")}
    assert eye
    result.load_state_dict({**dense.state_dict(), **eye}, strict=True)
    assert difference(result, dense) < 1e-6


def channels_of(kind, pairs, head_dim):
    """Return, in the order of a narrower head, the channels of a whole one that it keeps.

    A pair of -1 stands for two channels that rope does not rotate.
    """
    free = iter(range(kind.rotary, head_dim))
    half = kind.rotary // 2
    found = []
    for pair in pairs:
        if pair < 0:
            found.append((next(free), next(free)))
        else:
            found.append((2 * pair, 2 * pair + 1) if kind.pairs != "half" else (pair, pair + half))
    return torch.tensor([a for a, _ in found] + [b for _, b in found])


def head_rows(heads, head_dim, kept):
    """Return the rows of a linear that hold these channels of every head."""
    return torch.cat([head_dim * head + kept[head] for head in range(heads)])


@each_model_type
def test_narrower_heads_give_the_logits_of_a_model_without_their_other_channels(model_type):
    config = config_of(model_type)
    family, shape = shape_of(config)
    dim, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    narrow_qk = all(not any(norm.over == "head" for norm in kind.norms) for kind in shape.kinds)

    def narrower(_, form):
        return replace(form, vo_head_dim=dim - 3, qk_head_dim=4 if narrow_qk else dim)

    dense, result = model_of(config), result_of(config, narrower)
    state = {k: v.clone() for k, v in dense.state_dict().items()}
    cut = {}
    for layer, kind_index in enumerate(shape.kind_of):
        kind, prefix = shape.kinds[kind_index], family.layer.format(i=layer) + "."
        rows = {"v_proj": head_rows(shape.num_kv_heads, dim, [torch.arange(dim - 3)] * 8)}
        if narrow_qk:
            half = kind.rotary // 2
            partial = 0 < kind.rotary < dim
            pairs = [[half - 1, 0], [-1, half - 1] if partial else [0, half - 1]]
            pairs = [[-1, -1]] * 4 if not kind.rotary else (pairs * 2)[: shape.num_kv_heads]
            kept = [channels_of(kind, each, dim) for each in pairs]
            rows["q_proj"] = head_rows(
                shape.num_heads, dim, [kept[h // group] for h in range(shape.num_heads)]
            )
            rows["k_proj"] = head_rows(shape.num_kv_heads, dim, kept)
            if kind.rotary:
                cut[prefix + family.below_layer("rope_pairs")] = torch.tensor(pairs)
        for role, index in rows.items():
            for part in ("weight", "bias"):
                name = prefix + family.below_layer(f"{role}.{part}")
                if name in state:
                    cut[name] = state[name][index]
                    state[name] = torch.zeros_like(state[name]).index_copy(0, index, cut[name])
        name = prefix + family.below_layer("o_proj.weight")
        columns = head_rows(shape.num_heads, dim, [torch.arange(dim - 3)] * shape.num_heads)
        cut[name] = state[name][:, columns]
    dense.load_state_dict(state, strict=True)
    result.load_state_dict({**state, **cut}, strict=True)
    assert difference(result, dense) < 1e-6


def everything_narrower(kind, form):
    narrow_qk = not any(norm.over == "head" for norm in kind.norms)
    return replace(
        form,
        shortcuts=True,
        norm_weights=False,
        residual_in=20,
        residual_mid=20,
        residual_out=20,
        intermediate=15,
        qk_head_dim=6 if narrow_qk else form.qk_head_dim,
        vo_head_dim=5,
        biases=("q_proj", "o_proj", "down_proj"),
        ranks={"up_proj": 7, "v_proj": 3},
    )


def narrow_result(config):
    """Return a random result whose every width is below the original's."""
    code = classes(config.model_type)
    written = written_config(config, everything_narrower)
    written |= {"embedding_dim": 20, "head_input_dim": 20, "head_norm_weight": False}
    kept = {k: v for k, v in written.items() if k != "dtype"}
    torch.manual_seed(3)
    model = code.CompressedForCausalLM(code.CompressedConfig(**kept)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model, written


@each_model_type
def test_a_result_with_every_width_cut_generates_with_a_cache_of_fixed_size_what_it_gives_with_one(
    model_type,
):
    model, _ = narrow_result(config_of(model_type, tied=False))
    ids = ids_of()
    how = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    how |= {"attention_mask": torch.ones_like(ids)}
    static = model.generate(ids, cache_implementation="static", **how)
    assert torch.equal(static, model.generate(ids, **how))


@each_model_type
def test_a_result_with_every_width_cut_generates_with_its_cache_what_it_gives_without(model_type):
    model, _ = narrow_result(config_of(model_type, tied=False))
    ids = ids_of()
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        out = model(ids[:, :5], use_cache=True)
        steps = [out.logits]
        for at in range(5, ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-3, atol=1e-4)
        how = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        made = model.generate(ids, **how)
        assert torch.equal(made, model.generate(ids, use_cache=False, **how))
        seen = model(ids, output_hidden_states=True, output_attentions=False)
    assert [state.shape[-1] for state in seen.hidden_states] == [20, 20, 20]


@each_model_type
def test_gradients_are_the_same_with_checkpointing(model_type):
    model, _ = narrow_result(config_of(model_type, tied=False))
    ids, found = ids_of(), []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            with pytest.warns(FutureWarning, match="activation_checkpointing_enable"):
                model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        found.append({name: each.grad.clone() for name, each in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0])


def captured(model, layers, ids):
    """Return the input and the output of every layer."""
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    logits_of(model, ids)
    return seen


@pytest.mark.parametrize("cut", [False, True], ids=["dense", "cut"])
@each_model_type
def test_both_halves_of_a_layer_give_what_the_layer_gives(model_type, cut):
    config = config_of(model_type)
    family, shape = shape_of(config)
    model = narrow_result(config)[0] if cut else model_of(config, dtype=torch.float32)
    prefixes = [family.layer.format(i=i) for i in range(shape.num_layers)]
    seen = captured(model, [model.get_submodule(each) for each in prefixes], ids_of())
    for index, (hidden, after) in enumerate(seen):
        form = dense_form(shape, shape.kind_of[index])
        form = everything_narrower(shape.kind(form), form) if cut else form
        half = HalvedLayer(
            model.get_submodule(prefixes[index]).state_dict(), form, config.to_dict(),
            index=index, shape=shape, dtype=torch.float32, device="cpu",
        )  # fmt: skip
        torch.testing.assert_close(half.output(hidden), after, rtol=1e-4, atol=1e-5)


LOAD = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
ids = torch.load(folder + "/ids.pt")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
body = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = [model(ids).logits, again(ids).logits]
    hidden = [each(ids).last_hidden_state for each in (body, model.base_model)]
assert torch.equal(*hidden)
torch.save(logits, folder + "/logits.pt")
"""


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(each, marks=() if each == "opt" else pytest.mark.nightly)
        for each in MODEL_TYPES
    ],
)
def test_a_result_loads_and_is_saved_again_in_a_process_that_knows_only_its_folder(
    model_type, tmp_path
):
    model, written = narrow_result(config_of(model_type, tied=False))
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "modeling_compressed.py").write_bytes(code_of(model_type))
    torch.save(ids_of(), tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], check=True, cwd=tmp_path)
    for logits in torch.load(tmp_path / "logits.pt"):
        torch.testing.assert_close(logits, logits_of(model, ids_of()))
