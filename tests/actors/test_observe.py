"""The sums of a layer, against a float64 reference made with plain hooks on transformers' model."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from actors.modeling.outer_model import OuterModel
from actors.numerics.packed import unpacked
from actors.statistics.kinds import FUNCTIONS, Functions
from actors.statistics.observe import LayerStatistics, added
from actors.storage.checkpoint import Checkpoint
from planners import families
from planners.model.cost import statistic_elements
from planners.model.statistic_kinds import KINDS, StatisticKind
from planners.model.taps import Statistic
from planners.units.work import layer_statistics_work
from tests.builders import LENGTH, VOCABULARY, save_model

LAYER = 1  # not the first and not the last
HEAD_DIM = 12  # not hidden / heads
INPUTS = {
    "resid_attn": "input_layernorm",
    "resid_mlp": "post_attention_layernorm",
    "attn_in": "self_attn.k_proj",
    "o_in": "self_attn.o_proj",
    "mlp_in": "mlp.up_proj",
    "mlp_hidden": "mlp.down_proj",
}
OUTPUTS = {"q_rope": "self_attn.q_proj", "k_rope": "self_attn.k_proj", "v": "self_attn.v_proj"}
WIDE = ("resid_attn", "resid_mlp", "resid_out", "attn_in", "o_in", "mlp_in", "mlp_hidden", "v")
HEADED = ("o_in", "v")
STATISTICS = (
    *(Statistic(tap, kind) for tap in WIDE for kind in ("gram", "normed_gram")),
    *(Statistic(tap, "head_gram") for tap in HEADED),
    Statistic("q_rope", "pair_energy"),
    Statistic("k_rope", "pair_energy"),
    Statistic("resid_out", "cosine"),
)


@pytest.fixture(scope="module", params=("llama", "qwen2"))
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return save_model(folder, model_type=request.param, head_dim=HEAD_DIM)


@pytest.fixture(scope="module")
def expected(model):
    return reference_activations(model)


@pytest.fixture(scope="module")
def together(model):
    return observed(model, STATISTICS).tensors()


def token_ids():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (6, LENGTH), generator=generator)


@torch.inference_mode()
def reference_activations(folder):
    """Return tap -> activations (tokens, dim) of one layer, in float64, by hooks of our own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    layer = model.model.layers[LAYER]
    seen = {}

    def keep(tap, tensor):
        seen[tap] = tensor.flatten(0, 1)

    for tap, name in INPUTS.items():
        layer.get_submodule(name).register_forward_pre_hook(
            lambda _, args, tap=tap: keep(tap, args[0])
        )
    for tap, name in OUTPUTS.items():
        layer.get_submodule(name).register_forward_hook(lambda _, __, out, tap=tap: keep(tap, out))
    layer.register_forward_pre_hook(lambda _, args: keep("resid_in", args[0]))
    layer.register_forward_hook(lambda _, __, out: keep("resid_out", out))
    layer.self_attn.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(angles=kwargs["position_embeddings"]), with_kwargs=True
    )
    model(token_ids())
    cos, sin = seen.pop("angles")
    heads = {tap: split_heads(seen[tap]).unflatten(0, token_ids().shape) for tap in OUTPUTS}
    turned = apply_rotary_pos_emb(
        heads["q_rope"].transpose(1, 2), heads["k_rope"].transpose(1, 2), cos, sin
    )
    for tap, states in zip(("q_rope", "k_rope"), turned, strict=True):
        seen[tap] = states.transpose(1, 2).flatten(2).flatten(0, 1)  # as attention sees them
    return seen


def split_heads(x):
    return x.unflatten(-1, (-1, HEAD_DIM))


def expected_sum(seen, statistic):
    x = seen[statistic.tap]
    if statistic.kind == "gram":
        return x.T @ x
    if statistic.kind == "normed_gram":
        normed = x / x.square().mean(dim=-1, keepdim=True).sqrt()
        return normed.T @ normed
    if statistic.kind == "head_gram":
        return torch.einsum("thi,thj->hij", split_heads(x), split_heads(x))
    if statistic.kind == "pair_energy":
        squares = split_heads(x).square().sum(dim=0)  # (heads, head_dim)
        return squares[:, : HEAD_DIM // 2] + squares[:, HEAD_DIM // 2 :]
    before = seen["resid_in"]
    cosines = (before * x).sum(-1) / (before.norm(dim=-1) * x.norm(dim=-1))
    return cosines.sum()[None]


@torch.inference_mode()
def observed(folder, statistics, *, cut=2, dtype=torch.float32):
    """Return what one layer sums over microbatches of ``cut`` sequences."""
    checkpoint = Checkpoint(str(folder))
    family = families.load("llama")
    outer = OuterModel(checkpoint.config, family, dtype=dtype, device="cpu")
    outer.read_embedding(checkpoint)
    layers = [
        outer.layer(i, checkpoint.read_prefix(family.layer.format(i=i) + "."))
        for i in range(LAYER + 1)
    ]
    held = LayerStatistics(statistics, checkpoint.shape, family, device="cpu")
    for ids in token_ids().split(cut):
        hidden = outer.embed(ids)
        arguments = outer.layer_arguments(hidden)
        for index, layer in enumerate(layers):
            if index == LAYER:
                held.attach(layer)
            after = layer(hidden, **arguments[index])
            if index == LAYER:
                held.detach()
                held.update_residual(hidden, after)
            hidden = after
    return held


def assert_close(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    assert float((found - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
def test_every_statistic_is_that_of_the_dense_model(together, expected, statistic):
    found = together[str(statistic)]
    whole = unpacked(found) if statistic.kind in ("gram", "normed_gram") else found
    assert_close(whole, expected_sum(expected, statistic))


@pytest.mark.parametrize("tap", WIDE)
def test_a_gram_comes_with_the_sum_of_its_tokens(together, expected, tap):
    assert_close(together[f"{tap}.sum"], expected[tap].sum(dim=0))


@pytest.mark.parametrize("kind", ["gram", "normed_gram", "head_gram", "pair_energy", "cosine"])
def test_a_statistic_taken_alone_is_that_taken_with_others(model, together, kind):
    alone = observed(model, [s for s in STATISTICS if s.kind == kind]).tensors()
    assert [name for name in alone if not torch.equal(alone[name], together[name])] == []


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_the_cut_into_microbatches_does_not_matter(model, together, cut):
    for name, found in observed(model, STATISTICS, cut=cut).tensors().items():
        one = together[name]
        assert float((found - one).abs().max()) <= 1e-6 * float(one.abs().max()), name


def test_every_token_is_counted_once(together):
    assert together["num_tokens"].tolist() == [token_ids().numel()]


def test_nothing_is_summed_after_detaching(model):
    checkpoint = Checkpoint(str(model))
    family = families.load("llama")
    outer = OuterModel(checkpoint.config, family, dtype=torch.float32, device="cpu")
    layer = outer.layer(0, checkpoint.read_prefix(family.layer.format(i=0) + "."))
    held = LayerStatistics(STATISTICS, checkpoint.shape, family, device="cpu")
    held.attach(layer)
    held.detach()
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    layer(hidden, **outer.layer_arguments(hidden)[0])
    assert not any(total.any() for total in held.sums.values())


def test_half_precision_activations_are_summed_in_double(model, expected):
    statistic = Statistic("resid_mlp", "gram")
    found = observed(model, [statistic], dtype=torch.bfloat16)
    exact = expected_sum(expected, statistic)
    assert_close(unpacked(found.sums[str(statistic)]), exact, tolerance=0.05)


def test_every_kind_of_statistic_has_its_functions():
    assert KINDS.keys() == FUNCTIONS.keys()


def test_a_new_kind_of_statistic_is_a_row_and_its_functions(model, monkeypatch):
    def add_magnitudes(x, *, total):
        total += x.abs().flatten(0, -2).sum(dim=0, dtype=torch.float64)

    row = StatisticKind(name="magnitude", dims=lambda at, _number: (at.dim,))
    functions = Functions(add=add_magnitudes)
    monkeypatch.setitem(KINDS, "magnitude", row)
    monkeypatch.setitem(FUNCTIONS, "magnitude", functions)
    statistic = Statistic("mlp_in", "magnitude")
    held = observed(model, [statistic])
    expected = reference_activations(model)["mlp_in"].abs().sum(dim=0)
    assert_close(held.sums[str(statistic)], expected)
    shape = Checkpoint(str(model)).shape
    assert statistic_elements(shape, statistic) == len(expected) == shape.hidden
    parts = [observed(model, [statistic]).tensors() for _ in range(2)]
    assert torch.equal(
        added(parts, [str(statistic)])[str(statistic)], 2 * held.sums[str(statistic)]
    )
    layer = layer_statistics_work(shape, [statistic], tokens=8)
    assert layer.gram == 0
    assert layer.touched > 0


def test_the_number_of_a_kind_is_read_in_one_place():
    probe = Statistic("resid_attn", "probe8192")
    assert (probe.row.name, probe.probe_tokens) == ("probe", 8192)
    assert Statistic("resid_attn", "gram").probe_tokens == 0
    with pytest.raises(KeyError, match="grim"):
        _ = Statistic("resid_attn", "grim").row
