"""An aligned layer computes what it did, and is nearer to the layer that it was aligned with."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.methods._alignment import aligned
from actors.modeling.halves import HalvedLayer
from actors.numerics.packed import packed, unpacked
from planners.model.form import dense_form
from tests.families.test_symmetries import orthogonal, per_head
from tests.families.tiny import MODEL_TYPES, config_of, model_of, shape_of

HEAD_DIM = 8
OWN_HEADS = ("opt", "phi")  # a KV head for each query head
# GQA, interleaved pairs, partly rotated heads, biases and no gate, normalised q and k.
KINDS = ("llama", "helium", "phi", "opt", "qwen3")
COLUMNS = ("o_proj", "down_proj")
few = settings(max_examples=8)
each_model_type = pytest.mark.parametrize("model_type", MODEL_TYPES)
each_kind = pytest.mark.parametrize("model_type", KINDS)
groups = st.tuples(st.integers(1, 3), st.integers(1, 6))  # KV heads, query heads of each


@dataclass(frozen=True)
class Case:
    """Two layers of a model, by roles."""

    config: object
    family: object
    shape: object
    layers: list

    @property
    def form(self):
        return dense_form(self.shape, self.shape.kind_of[1])

    @property
    def kind(self):
        return self.shape.kind(self.form)

    def aligned(self, weights, source, sums=None):
        return aligned(weights, source, sums or {}, shape=self.shape, form=self.form)

    def halved(self, weights):
        named = {}
        for name, tensor in weights.items():
            role, part = name.split(".")
            named[f"{self.family.below_layer(role)}.{part}"] = tensor
        return HalvedLayer(
            named, self.form, self.config.to_dict(),
            index=1, shape=self.shape, dtype=torch.float64, device="cpu",
        )  # fmt: skip


def case_of(model_type, *, seed=0, kv_heads=2, group=2):
    group = 1 if model_type in OWN_HEADS else group
    heads = kv_heads * group
    config = config_of(
        model_type, hidden_size=HEAD_DIM * heads, num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **({"word_embed_proj_dim": HEAD_DIM * heads} if model_type == "opt" else {}),
    )  # fmt: skip
    family, shape = shape_of(config)
    state = model_of(config, seed=seed).state_dict()
    layers = []
    for index, own in enumerate(shape.kind_of):
        kind, prefix = shape.kinds[own], family.layer.format(i=index)
        roles = [*kind.roles, *(norm.role for norm in kind.norms)]
        names = [f"{role}.{part}" for role in roles for part in ("weight", "bias")]
        below = {
            n: f"{prefix}.{family.below_layer(n.split('.')[0])}.{n.split('.')[1]}" for n in names
        }
        layers.append({n: state[path] for n, path in below.items() if path in state})
    return Case(config, family, shape, layers)


def stream(case):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, 9, case.shape.hidden, generator=generator, dtype=torch.float64)


def halves(case, weights):
    """Return what both blocks add to the residual stream."""
    half = case.halved(weights)
    with torch.no_grad():
        return half.attention(stream(case)), half.mlp(stream(case))


def gains(weights, source):
    """Return the inner products of the linears of the attention and of the MLP."""
    found = {"attention": 0.0, "mlp": 0.0}
    for name in weights:
        role, part = name.split(".")
        if role.endswith("_proj") and not (role in COLUMNS and part == "bias"):
            module = "attention" if role in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            found[module] += float((weights[name] * source[name]).sum())
    return found


def difference(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


# A random element of the groups, written down once more.


def placed(order, width):
    return torch.kron(torch.eye(len(order)).double()[order], torch.eye(width).double())


def turned_qk(kind):
    """Return a random map of q and k of a KV head that leaves the scores as they are."""
    found = torch.eye(HEAD_DIM).double()
    if kind.space("qk").group == "none":
        return found
    pairs, rope = kind.rotary // 2, kind.rotary
    for pair in range(pairs):
        both = [pair, pair + pairs] if kind.pairs == "half" else [2 * pair, 2 * pair + 1]
        index, angle = torch.tensor(both), 6.3 * torch.rand(()).double()
        cos, sin = angle.cos(), angle.sin()
        found[index[:, None], index] = torch.tensor([[cos, -sin], [sin, cos]]).double()
    if rope < HEAD_DIM:
        found[rope:, rope:] = orthogonal(HEAD_DIM - rope, fixes_mean=False)
    return found


def scrambled(case, weights, seed):
    """Return a layer that computes the same with its inner channels moved at random."""
    torch.manual_seed(seed)
    shape, kind = case.shape, case.kind
    kv_heads, group = shape.num_kv_heads, shape.num_heads // shape.num_kv_heads
    order = torch.randperm(kv_heads)
    queries = torch.cat([old * group + torch.randperm(group) for old in order])
    of_scores = [turned_qk(kind) for _ in range(kv_heads)]
    of_values = [orthogonal(HEAD_DIM, fixes_mean=False) for _ in range(kv_heads)]
    units = torch.eye(shape.intermediate).double()[torch.randperm(shape.intermediate)]
    is_gated = "gate_proj" in kind.roles
    signs = torch.randint(2, (len(units), 1)) * 2 - 1 if is_gated else torch.ones(len(units), 1)
    maps = {
        "q_proj": per_head(of_scores, group) @ placed(queries, HEAD_DIM),
        "k_proj": per_head(of_scores, 1) @ placed(order, HEAD_DIM),
        "v_proj": per_head(of_values, 1) @ placed(order, HEAD_DIM),
        "o_proj": per_head(of_values, group) @ placed(queries, HEAD_DIM),
        "gate_proj": units,
        "up_proj": signs * units,
        "down_proj": signs * units,
    }
    new = dict(weights)
    for name, tensor in weights.items():
        role, part = name.split(".")
        if role in COLUMNS and part == "weight":
            new[name] = tensor @ maps[role].T
        elif role in maps and role not in COLUMNS:
            new[name] = maps[role] @ tensor
    return new


# Stock rope of some models computes in float32.
def tolerance(model_type):
    return 1e-6 if model_type in ("cohere", "ernie4_5") else 1e-10


@each_model_type
def test_an_aligned_layer_computes_what_it_did(model_type):
    case = case_of(model_type)
    new, _ = case.aligned(case.layers[1], case.layers[0])
    assert new.keys() == case.layers[1].keys()
    assert any(not torch.equal(new[name], case.layers[1][name]) for name in new)
    for found, before in zip(halves(case, new), halves(case, case.layers[1]), strict=True):
        assert difference(found, before) < tolerance(model_type)


@each_kind
@few
@given(groups, st.integers(0, 2**32))
def test_any_number_of_heads_computes_what_it_did_and_is_nearer(model_type, heads, seed):
    case = case_of(model_type, seed=seed, kv_heads=heads[0], group=heads[1])
    old, source = case.layers[1], case.layers[0]
    new, _ = case.aligned(old, source)
    for found, before in zip(halves(case, new), halves(case, old), strict=True):
        assert difference(found, before) < 1e-10
    before, after = gains(old, source), gains(new, source)
    assert all(after[module] >= before[module] - 1e-9 for module in before)


@each_kind
@few
@given(groups, st.integers(0, 2**32))
def test_a_scrambled_copy_is_undone(model_type, heads, seed):
    case = case_of(model_type, seed=seed, kv_heads=heads[0], group=heads[1])
    source = scrambled(case, case.layers[1], seed)
    new, _ = case.aligned(case.layers[1], source)
    assert max(difference(new[name], source[name]) for name in source) < 1e-8


@each_kind
@few
@given(st.tuples(st.integers(1, 3), st.integers(1, 4)), st.integers(0, 2**32))
def test_no_other_element_of_the_groups_is_nearer(model_type, heads, seed):
    case = case_of(model_type, seed=seed, kv_heads=heads[0], group=heads[1])
    old, source = case.layers[1], case.layers[0]
    best = gains(case.aligned(old, source)[0], source)
    for other in range(10):
        found = gains(scrambled(case, old, other), source)
        assert all(found[module] <= best[module] + 1e-9 for module in best)


@each_kind
@few
@given(groups, st.integers(0, 2**32))
def test_it_does_not_matter_from_which_copy_a_layer_is_aligned(model_type, heads, seed):
    """Of up to four query heads: the order of more is a local optimum."""
    case = case_of(model_type, seed=seed, kv_heads=heads[0], group=min(heads[1], 4))
    old, source = case.layers[1], case.layers[0]
    one, _ = case.aligned(old, source)
    other, _ = case.aligned(scrambled(case, old, seed), source)
    assert gains(one, source) == pytest.approx(gains(other, source), rel=1e-9)


@each_model_type
def test_a_layer_aligned_with_itself_or_once_more_stays_the_same_to_the_last_bit(model_type):
    case = case_of(model_type)
    old, source = case.layers[1], case.layers[0]
    sums = observed(case, old)
    same, same_sums = case.aligned(old, old, sums)
    assert all(torch.equal(same[name], old[name]) for name in old)
    assert same_sums.keys() == sums.keys()
    assert all(torch.equal(same_sums[name], sums[name]) for name in sums)
    once, _ = case.aligned(old, source)
    twice, _ = case.aligned(once, source)
    assert all(torch.equal(twice[name], once[name]) for name in once)


def taps_of(case, weights):
    """Return what is seen at the taps whose channels may move, and at one more."""
    half, seen = case.halved(weights), {}

    def watch(role, tap, *, output):
        module = half.module.get_submodule(case.family.below_layer(role))
        module.register_forward_hook(
            lambda _, args, out: seen.update({tap: (out if output else args[0]).flatten(0, 1)})
        )

    for role, tap in (("q_proj", "q_rope"), ("k_proj", "k_rope"), ("v_proj", "v")):
        watch(role, tap, output=True)
    for role, tap in (("attn_norm", "resid_attn"), ("o_proj", "o_in"), ("down_proj", "mlp_hidden")):
        watch(role, tap, output=False)
    with torch.no_grad():
        half.attention(stream(case))
        half.mlp(stream(case))
    return seen


def observed(case, weights):
    """Return the statistics of a layer, in float64: all that move, and some that do not."""
    kind, found = case.kind, {"num_tokens": torch.tensor([18])}
    energy = "pair_energy" if kind.pairs == "half" else "adjacent_pair_energy"
    for tap, x in taps_of(case, weights).items():
        found[f"{tap}.gram"], found[f"{tap}.sum"] = packed(x.T @ x), x.sum(0)
        normed = x / x.square().mean(1, keepdim=True).sqrt()
        found[f"{tap}.normed_gram"] = packed(normed.T @ normed)
        if tap in ("q_rope", "k_rope", "v"):
            heads = x.unflatten(1, (-1, HEAD_DIM)).transpose(0, 1)
            found[f"{tap}.head_gram"] = heads.mT @ heads
        if tap in ("q_rope", "k_rope") and kind.rotary:
            squares = x.square().sum(0).reshape(-1, HEAD_DIM)[:, : kind.rotary]
            halved = (2, -1) if kind.pairs == "half" else (-1, 2)
            of_pairs = squares.unflatten(1, halved).sum(1 if kind.pairs == "half" else 2)
            found[f"{tap}.{energy}"] = of_pairs
    return found


@each_model_type
def test_statistics_move_with_the_channels(model_type):
    case = case_of(model_type)
    sums = observed(case, case.layers[1])
    new, moved = case.aligned(case.layers[1], case.layers[0], sums)
    expected = observed(case, new)
    assert moved.keys() == expected.keys()
    assert not torch.equal(moved["o_in.gram"], sums["o_in.gram"])
    for name, found in moved.items():
        assert difference(found, expected[name]) < tolerance(model_type), name


def test_a_full_gram_moves_as_a_packed_one():
    case = case_of("llama")
    sums = {
        f"{tap}.gram": observed(case, case.layers[1])[f"{tap}.gram"]
        for tap in ("o_in", "mlp_hidden")
    }
    full = {name: unpacked(total) for name, total in sums.items()}
    packed_ones, full_ones = (
        case.aligned(case.layers[1], case.layers[0], each)[1] for each in (sums, full)
    )
    for name in sums:
        assert torch.equal(unpacked(packed_ones[name]), full_ones[name])


def test_a_statistic_that_cannot_be_moved_is_left_out_and_one_elsewhere_stays():
    case = case_of("llama")
    names = ("v.probe", "q_rope.adjacent_pair_energy", "attn_in.gram", "probe", "num_tokens")
    _, found = case.aligned(*case.layers[::-1], {name: torch.ones(1) for name in names})
    assert sorted(found) == ["attn_in.gram", "num_tokens", "probe"]


@each_kind
def test_arguments_are_not_changed(model_type):
    case = case_of(model_type)
    given = (*case.layers[::-1], observed(case, case.layers[1]))
    before = [{name: tensor.clone() for name, tensor in each.items()} for each in given]
    case.aligned(*given)
    for each, copy in zip(given, before, strict=True):
        assert each.keys() == copy.keys()
        assert all(torch.equal(each[name], copy[name]) for name in copy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_leave_in_their_dtype_and_units_and_heads_that_only_move_are_exact(dtype):
    case = case_of("qwen3")
    old, source = ({name: t.to(dtype) for name, t in each.items()} for each in case.layers[::-1])
    new, _ = case.aligned(old, source)
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    for name in ("gate_proj.weight", "q_proj.weight", "k_proj.weight"):
        rows = [sorted(map(tuple, each[name].tolist())) for each in (old, new)]
        assert rows[0] == rows[1]
