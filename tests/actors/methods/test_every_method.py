"""What every method that cuts promises, on small random layers; nothing here names a file."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from actors import methods
from actors.layer_units.sharing import sources_of
from actors.methods.modegpt import value_maps
from actors.modeling.outer_model import OuterModel
from actors.modeling.travelling import COMPRESSED
from actors.numerics.low_rank import low_rank
from actors.numerics.nystrom import nystrom
from orchestrator.recipe.method_options import resolve_options
from planners.budget.sharing import PREVIOUS
from planners.budget.widths import form_of
from planners.canonical_json import to_json
from planners.errors import NumericsError
from planners.families import load as load_family
from planners.method import Target
from planners.model.cost import dense_start, layer_parameters
from planners.model.form import SOURCE, Link, dense_form
from planners.model.layer import ROLES
from planners.model.shape import ModelShape
from planners.model.taps import INPUT_OF
from tests.shapes import dense_dims, full_widths, has_bias, llama_shape

NAMES = [name for name in methods.available() if not methods.spec(name).quantises]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEQUENCES = 3
few = settings(max_examples=20)


@dataclass(frozen=True)
class Case:
    """One dense layer, and what was seen of it."""

    shape: ModelShape
    weights: dict
    hidden: torch.Tensor  # (sequences, tokens, hidden)
    taps: dict  # name -> (tokens, width)
    sums: dict


@st.composite
def shapes(draw):
    kv_heads, group, half = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.integers(2, 4)),
    )
    return llama_shape(
        family="llama",
        model_type="llama",
        num_layers=1,
        hidden=draw(st.integers(9, 20)),
        intermediate=draw(st.integers(9, 24)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * half,
        vocab_size=11,
        tied=False,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@st.composite
def cases(draw, *, dtype=torch.float64, max_tokens=40):
    shape = draw(shapes())
    return case_of(shape, draw(st.integers(0, 2**32)), draw(st.integers(12, max_tokens)), dtype)


def case_of(shape, seed, length, dtype=torch.float64):
    weights = random_weights(shape, seed, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    spread = torch.logspace(0, -1, shape.hidden, dtype=torch.float64)
    dims = (SEQUENCES, length, shape.hidden)
    hidden = torch.randn(dims, generator=generator, dtype=torch.float64) * spread
    return Case(shape, weights, hidden, *observed(shape, weights, hidden))


def random_weights(shape, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name in ROLES:
        out_dim, in_dim = dense_dims(shape, name)
        weights[f"{name}.weight"] = torch.randn(out_dim, in_dim, generator=generator) / in_dim**0.5
        if has_bias(shape, name):
            weights[f"{name}.bias"] = 0.3 * torch.randn(out_dim, generator=generator)
    for norm in ("attn_norm.weight", "mlp_norm.weight"):
        weights[norm] = 1 + 0.2 * torch.randn(shape.hidden, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


# The dense layer, written down once more.


def linear(weights, name, x):
    y = x @ weights[f"{name}.weight"].double().T
    return y + weights[f"{name}.bias"].double() if f"{name}.bias" in weights else y


def normed(weights, name, x):
    scale = weights[f"{name}.weight"].double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * scale


EPS = 1e-6
THETA = 10000.0


def turned(x, head_dim):
    """Turn heads (..., tokens, head_dim) by the angles of their positions."""
    half = head_dim // 2
    inverse = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * inverse
    cos, sin = angles.cos(), angles.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def heads_of(x, count):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)  # (sequences, heads, tokens, dim)


def attended(shape, q, k, v, *, kept=None):
    """Return o_proj's input; pairs of q and k that are not ``kept`` count as zeros."""
    group = shape.num_heads // shape.num_kv_heads
    q, k, v = (
        heads_of(q, shape.num_heads),
        heads_of(k, shape.num_kv_heads),
        heads_of(v, shape.num_kv_heads),
    )
    if kept is not None:
        mask = torch.zeros(shape.num_kv_heads, shape.head_dim // 2, dtype=torch.float64)
        mask = mask.scatter(1, kept, 1.0).repeat(1, 2)[:, None, :]  # both channels of a pair
        q, k = q * mask.repeat_interleave(group, dim=0), k * mask
    q, k = (turned(x, shape.head_dim) for x in (q, k))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / shape.head_dim**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


def observed(shape, weights, hidden, *, kept=None):
    """Return the taps of a dense layer and the sums over them."""
    taps = {"resid_attn": hidden, "attn_in": normed(weights, "attn_norm", hidden)}
    for tap, name in (("q_rope", "q_proj"), ("k_rope", "k_proj"), ("v", "v_proj")):
        taps[tap] = linear(weights, name, taps["attn_in"])
    taps["o_in"] = attended(shape, taps["q_rope"], taps["k_rope"], taps["v"], kept=kept)
    taps["resid_mlp"] = hidden + linear(weights, "o_proj", taps["o_in"])
    taps["mlp_in"] = normed(weights, "mlp_norm", taps["resid_mlp"])
    gate, up = (linear(weights, name, taps["mlp_in"]) for name in ("gate_proj", "up_proj"))
    taps["mlp_hidden"] = silu(gate) * up
    taps["resid_out"] = taps["resid_mlp"] + linear(weights, "down_proj", taps["mlp_hidden"])
    flat = {tap: x.flatten(0, 1) for tap, x in taps.items()}
    sums = {f"{tap}.gram": x.T @ x for tap, x in flat.items()}
    sums |= {f"{tap}.sum": x.sum(0) for tap, x in flat.items()}
    v = flat["v"].unflatten(1, (shape.num_kv_heads, -1)).transpose(0, 1)
    sums["v.head_gram"] = v.transpose(1, 2) @ v
    for tap in ("q_rope", "k_rope"):
        energy = flat[tap].square().sum(0).reshape(-1, 2, shape.head_dim // 2)
        sums[f"{tap}.pair_energy"] = energy.sum(1)
    sums["num_tokens"] = torch.tensor([len(flat["v"])])
    return flat, sums


def run(shape, form, tensors, hidden):
    """Return what the shipped layer makes of a residual stream, in float64."""
    family = load_family(shape.family)
    names = {**family.linears, **family.norms, "rope_pairs": "self_attn.rope_pairs"}
    named = {}
    for role, tensor in tensors.items():
        part, dot, rest = role.partition(".")
        named[f"{names.get(part, part)}{dot}{rest}"] = tensor
    config = {
        "model_type": COMPRESSED, "compressed_from": shape.model_type,
        "layout": family.layout(shape), "num_hidden_layers": 1, "vocab_size": 1,
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.num_heads, "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim, "rms_norm_eps": EPS, "embedding_dim": shape.hidden,
        "head_input_dim": shape.hidden,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "pad_token_id": None, "layer_forms": [to_json(form)],
    }  # fmt: skip
    outer = OuterModel(config, load_family("llama"), dtype=torch.float64, device="cpu")
    with torch.inference_mode():
        return outer.layer(0, named)(hidden, **outer.layer_arguments(hidden)[0])


# Each method, from its own spec to the tensors of a layer.


class Before:
    """Another layer before the one of a case, which nothing is taken from but whole matrices."""

    takers: ClassVar = {}

    def __init__(self, case):
        dtype = next(iter(case.weights.values())).dtype
        self.own = random_weights(case.shape, 4321, dtype)

    def weights(self, layer):
        assert layer == PREVIOUS
        return self.own

    def sums(self, layer):
        raise NotImplementedError(layer)

    def stored(self, layer):
        raise NotImplementedError(layer)


def options_of(name, **given):
    return resolve_options(methods.spec(name), given)


def compressed(name, case, form, options):
    """Return the tensors of the layer with the widths of ``form``, and what the method says."""
    method = methods.load(name)
    if not methods.spec(name).residual:
        more = {"neighbours": Before(case)} if methods.spec(name).shares else {}
        return method.compress(
            case.weights, case.sums, shape=case.shape, form=form, options=options, **more
        )
    dims = (form.residual_in, form.residual_mid, form.residual_out)
    wanted = {s.tap for s in methods.spec(name).statistics(case.shape, options)}
    bases = [
        method.factor(
            [case.sums[f"{tap}.gram"]] if tap in wanted else [], keep_dim=dim, where=f"tap {tap}"
        )
        for tap, dim in zip(("resid_attn", "resid_mlp", "resid_out"), dims, strict=True)
    ]
    new = method.apply(case.weights, tuple(b.vectors for b in bases), shape=case.shape, form=form)
    return new, {"bases": bases}


def cut_form(name, shape, share, options):
    """Return the form of a layer with about a share of its widths, without any budget."""
    if name == "slicegpt":
        return (
            methods.spec(name)
            .form(shape, dense_start(shape), Target(slice=1 - share), options)
            .layers[0]
        )
    if name in ("svdllm", "basis_sharing", "deltallm"):
        ranks = {
            linear_: max(1, int(share * o * i / (o + i)))
            for linear_ in ROLES
            for o, i in (dense_dims(shape, linear_),)
        }
        link = Link(layer=PREVIOUS, parts=(SOURCE,), fitted=True)
        links = dict.fromkeys(ROLES, link) if name == "deltallm" else {}
        return replace(dense_form(shape), ranks=ranks, links=links)
    widths = {
        module: max(2, 2 * round(share * full / 2)) for module, full in full_widths(shape).items()
    }
    return form_of(shape, [widths]).layers[0]


def own_options(name):
    return options_of(name, round_to="1") if name == "slicegpt" else options_of(name)


SHARES = st.floats(0.2, 0.9)


@pytest.mark.parametrize("name", NAMES)
@few
@given(case=cases())
def test_full_width_changes_nothing(name, case):
    options = own_options(name)
    target = Target(slice=0.0) if methods.spec(name).residual else Target(keep_fraction=1.0)
    if methods.spec(name).only_shrinks:
        form = (
            methods.spec(name).form(case.shape, dense_start(case.shape), target, options).layers[0]
        )
        new, _ = compressed(name, case, form, options)
        assert new.keys() == case.weights.keys()
        assert all(torch.equal(new[role], case.weights[role]) for role in new)
        return
    form = methods.spec(name).form(case.shape, dense_start(case.shape), target, options).layers[0]
    new, said = compressed(name, case, form, options)
    first, _, last = (basis.vectors for basis in said["bases"])
    out = run(case.shape, form, new, case.hidden @ first)
    expected = case.taps["resid_out"].reshape(case.hidden.shape)
    assert torch.allclose(out @ last.T, expected, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@few
@given(case=cases(), share=SHARES)
def test_the_tensors_hold_the_parameters_that_the_planners_count(name, case, share):
    options = own_options(name)
    form = cut_form(name, case.shape, share, options)
    new, _ = compressed(name, case, form, options)
    stored = sum(t.numel() for t in new.values() if t.is_floating_point())
    assert stored == layer_parameters(case.shape, form)
    taken = sources_of(form, Before(case))
    x = torch.randn(1, 4, form.residual_in, dtype=torch.float64)
    out = run(case.shape, form, new | taken, x)
    assert out.shape[-1] == form.residual_out
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.data(), share=SHARES, dtype=st.sampled_from(DTYPES))
def test_weights_keep_their_dtype_and_the_inputs_are_not_changed(name, data, share, dtype):
    case = data.draw(cases(dtype=dtype))
    inputs = {**case.weights, **case.sums}
    before = {key: tensor.clone() for key, tensor in inputs.items()}
    options = own_options(name)
    new, _ = compressed(name, case, cut_form(name, case.shape, share, options), options)
    assert {t.dtype for t in new.values() if t.is_floating_point()} == {dtype}
    assert [key for key in before if not torch.equal(before[key], inputs[key])] == []


def errors_of(name, case, share):
    """Return part -> error at one width; for a basis the energy outside of it."""
    options = own_options(name)
    _, said = compressed(name, case, cut_form(name, case.shape, share, options), options)
    if "bases" in said:
        return {i: 1 - basis.energy_kept for i, basis in enumerate(said["bases"])}
    return said["errors"]


@pytest.mark.parametrize("name", NAMES)
@few
@given(case=cases(), shares=st.tuples(SHARES, SHARES))
def test_a_larger_width_never_has_a_larger_error(name, case, shares):
    small, large = (errors_of(name, case, share) for share in sorted(shares))
    for part, error in large.items():
        assert 0 <= error <= small[part] + 1e-9, part


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@few
@given(cases(), SHARES)
def test_the_error_of_a_low_rank_linear_is_that_on_its_tokens(case, share):
    form = cut_form("svdllm", case.shape, share, {})
    new, said = compressed("svdllm", case, form, own_options("svdllm"))
    for name in ROLES:
        x = case.taps[INPUT_OF[name]]
        found = x @ new[f"{name}.first.weight"].T @ new[f"{name}.second.weight"].T
        expected = x @ case.weights[f"{name}.weight"].T
        assert said["errors"][name] == pytest.approx(relative(found, expected), abs=2e-5)


@few
@given(cases(), SHARES)
def test_the_error_of_a_cut_mlp_is_that_on_its_tokens(case, share):
    options = options_of("modegpt", ridge="1e-12")
    form = cut_form("modegpt", case.shape, share, options)
    form = replace(dense_form(case.shape), intermediate=form.intermediate)
    new, said = compressed("modegpt", case, form, options)
    dense, x = case.weights, case.taps["mlp_in"]
    gate, up = (linear(new, name, x) for name in ("gate_proj", "up_proj"))
    found = (silu(gate) * up) @ new["down_proj.weight"].T
    expected = case.taps["mlp_hidden"] @ dense["down_proj.weight"].T
    error = said["errors"].get("mlp", 0.0)
    assert error == pytest.approx(relative(found, expected), abs=2e-5)


@few
@given(cases(), SHARES)
def test_the_error_of_cut_values_is_that_on_the_tokens_of_v(case, share):
    shape, options = case.shape, own_options("modegpt")
    keep = cut_form("modegpt", shape, share, options).vo_head_dim
    form = form_of(shape, [full_widths(shape) | {"vo": keep}]).layers[0]
    new, said = compressed("modegpt", case, form, options)
    group = shape.num_heads // shape.num_kv_heads
    lost = energy = 0.0
    for head in range(shape.num_heads):
        kv = head // group
        old_v = case.weights["v_proj.weight"].unflatten(0, (shape.num_kv_heads, -1))[kv]
        new_v = new["v_proj.weight"].unflatten(0, (shape.num_kv_heads, -1))[kv]
        old_o = case.weights["o_proj.weight"].unflatten(1, (shape.num_heads, -1))[:, head]
        new_o = new["o_proj.weight"].unflatten(1, (shape.num_heads, -1))[:, head]
        x = case.taps["attn_in"]
        expected = x @ old_v.T @ old_o.T
        lost += float((expected - x @ new_v.T @ new_o.T).square().sum())
        energy += float(expected.square().sum())
    error = said["errors"].get("vo", 0.0)
    assert error == pytest.approx(math.sqrt(lost / energy), abs=2e-5)


@few
@given(cases(), st.data())
def test_the_energy_of_a_basis_is_that_of_its_tokens(case, data):
    keep = data.draw(st.integers(1, case.shape.hidden))
    options = own_options("slicegpt")
    form = cut_form("slicegpt", case.shape, keep / case.shape.hidden, options)
    _, said = compressed("slicegpt", case, form, options)
    x = case.taps["resid_attn"]
    basis = said["bases"][0]
    left = x - x @ basis.vectors @ basis.vectors.T
    assert math.sqrt(max(0.0, 1 - basis.energy_kept)) == pytest.approx(
        relative(left + x, x), abs=1e-6
    )


# Rope pairs, groups of heads, the bias of v.


@few
@given(cases(), st.data())
def test_dropping_rope_pairs_is_zeroing_them_before_rope(case, data):
    shape = case.shape
    keep = 2 * data.draw(st.integers(1, shape.head_dim // 2))
    form = replace(dense_form(shape), qk_head_dim=keep)
    new, _ = compressed("modegpt", case, form, own_options("modegpt"))
    kept = new.get("rope_pairs")
    expected, _ = observed(shape, case.weights, case.hidden, kept=kept)
    out = run(shape, form, new, case.hidden)
    assert torch.allclose(out, expected["resid_out"].reshape(out.shape), atol=1e-6)
    if kept is not None:
        assert kept.shape == (shape.num_kv_heads, keep // 2)  # one set for a whole group
        energy = case.sums["q_rope.pair_energy"].reshape(
            shape.num_kv_heads, -1, shape.head_dim // 2
        )
        scores = energy.sum(1) * case.sums["k_rope.pair_energy"]
        dropped = scores.scatter(1, kept, -1.0).max(1).values
        assert (scores.gather(1, kept).min(1).values >= dropped).all()


@few
@given(shapes(), st.integers(0, 2**32))
def test_values_of_lower_rank_lose_nothing_and_their_bias_moves_exactly(shape, seed):
    rank = shape.head_dim - 2
    weights = random_weights(shape, seed, torch.float64)
    value = weights["v_proj.weight"].unflatten(0, (shape.num_kv_heads, -1)).clone()
    value[:, rank:] = torch.randn(2, rank, dtype=torch.float64) @ value[:, :rank]
    weights["v_proj.weight"] = value.flatten(0, 1)
    hidden = case_of(shape, seed, 30).hidden
    case = Case(shape, weights, hidden, *observed(shape, weights, hidden))
    form = form_of(shape, [full_widths(shape) | {"vo": rank}]).layers[0]
    new, said = compressed("modegpt", case, form, own_options("modegpt"))
    assert "v_proj.bias" not in new
    expected = case.taps["resid_out"].reshape(hidden.shape)
    assert torch.allclose(run(shape, form, new, hidden), expected, atol=1e-4)
    assert "singular" in said["rungs"]["vo"]
    if has_bias(shape, "v_proj"):
        group = shape.num_heads // shape.num_kv_heads
        spread = weights["v_proj.bias"].unflatten(0, (shape.num_kv_heads, -1))
        moved = weights["o_proj.weight"] @ spread.repeat_interleave(group, dim=0).flatten()
        assert torch.allclose(
            new["o_proj.bias"], moved + weights.get("o_proj.bias", 0.0), atol=1e-12
        )


# The same by other means.


@few
@given(
    seed=st.integers(0, 2**32),
    condition=st.floats(0, 4),
    group=st.integers(1, 4),
    keep=st.integers(1, 8),
)
def test_values_through_h_x_h_grams_are_those_of_the_d_x_d_square_root(
    seed, condition, group, keep
):
    generator = torch.Generator().manual_seed(seed)
    d, h = 32, 8
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -condition, d, dtype=torch.float64)
    gram = (turn * values) @ turn.T  # of the layer's input, condition number 10^condition
    gram = (gram + gram.T) / 2
    value, output = (
        torch.randn(dims, generator=generator, dtype=torch.float64)
        for dims in ((d, h), (h, group * d))
    )
    found = value_maps(value.T @ gram @ value, output, keep=keep, where="")
    ours = value @ found.values @ found.outputs
    root, inverse = ((turn * values**power) @ turn.T for power in (0.5, -0.5))
    left, sizes, right = torch.linalg.svd(root @ value, full_matrices=False)
    inner = torch.linalg.svd(sizes[:, None] * right @ output, full_matrices=False)
    theirs = inverse @ left @ inner.U[:, :keep] @ (inner.S[:keep, None] * inner.Vh[:keep])
    # Where two directions weigh the same, which of them stays is a matter of rounding.
    if keep == h or float(inner.S[keep - 1] / inner.S[keep]) > 1.01:
        assert relative(ours, theirs) <= 1e-8


@few
@given(st.integers(0, 2**32), st.integers(2, 20), st.data())
def test_the_refit_is_the_least_squares_solution(seed, dim, data):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(80, dim, generator=generator, dtype=torch.float64)
    weights = torch.randn(dim, 5, generator=generator, dtype=torch.float64)
    keep = data.draw(st.integers(1, dim))
    found = nystrom(x.T @ x, weights, ridge=0.0, where="")
    kept, refitted = found.refit(keep)
    expected = torch.linalg.lstsq(x[:, kept], x @ weights).solution
    assert torch.allclose(refitted, expected, atol=1e-8)
    error = relative(x[:, kept] @ expected, x @ weights)
    assert found.relative_error(keep) == pytest.approx(error, abs=1e-7)


@given(st.integers(0, 2**32), st.integers(2, 16))
def test_units_are_ordered_by_leverage_however_small_the_ridge(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, dim, generator=generator, dtype=torch.float64)
    gram = x.T @ x
    weights = torch.eye(dim, dtype=torch.float64)
    expected = torch.linalg.inv(gram).diagonal().argsort()
    for ridge in (0.0, 1e-14):
        assert torch.equal(nystrom(gram, weights, ridge=ridge, where="").order, expected)


# What is left of the Gram matrices behind a cut.


@few
@given(cases(), SHARES, st.booleans())
def test_gram_matrices_behind_a_cut_are_those_of_the_inputs_of_the_cut_layer(case, share, both):
    """Of its own inputs as they were: those of a cut before it are not known."""
    cut = cut_form("modegpt", case.shape, share, own_options("modegpt"))
    form = replace(dense_form(case.shape), vo_head_dim=cut.vo_head_dim)
    if both:
        form = replace(form, intermediate=cut.intermediate)
    carried = {}
    new, _ = methods.load("modegpt").compress(
        case.weights, case.sums, shape=case.shape, form=form,
        options=own_options("modegpt"), carried=carried,
    )  # fmt: skip
    values = linear(new, "v_proj", case.taps["attn_in"])
    split = [case.taps["q_rope"], case.taps["k_rope"], values]
    sequences = [x.unflatten(0, case.hidden.shape[:2]) for x in split]
    gate, up = (linear(new, name, case.taps["mlp_in"]) for name in ("gate_proj", "up_proj"))
    inputs = {
        "o_in.gram": attended(case.shape, *sequences).flatten(0, 1),
        "mlp_hidden.gram": silu(gate) * up,
    }
    whole = {"o_in.gram": form.vo_head_dim == case.shape.head_dim,
             "mlp_hidden.gram": form.intermediate == case.shape.intermediate}  # fmt: skip
    assert carried.keys() == {name for name in inputs if not whole[name]}
    for name, gram in carried.items():
        x = inputs[name]
        assert torch.allclose(gram, x.T @ x, atol=1e-9 * float(x.square().sum())), name


# Grams that do not behave.


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_singular_gram_is_used_and_reported(tokens):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    first, second, error, rung = low_rank(weight, x.T @ x, rank=6, where="up_proj")
    assert "singular" in rung or "damped" in rung or tokens == 0
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    assert relative(x @ first.T @ second.T, x @ weight.T) < 1e-3 or tokens == 0
    assert 0 <= error <= 1
    found = nystrom(x.T @ x, weight.T, ridge=0.0, where="tap mlp_hidden")
    assert "singular" in found.rung or "damped" in found.rung
    assert torch.isfinite(found.refit(5)[1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gram_that_is_not_finite_is_refused_with_its_place(name, broken):
    shape = llama_shape(
        family="llama", model_type="llama", num_layers=1, hidden=12, intermediate=16, num_heads=4,
        num_kv_heads=2, head_dim=4, vocab_size=11, tied=False,
    )  # fmt: skip
    case = case_of(shape, 0, 20)
    options = own_options(name)
    form = cut_form(name, shape, 0.5, options)
    for statistic, total in case.sums.items():
        if not statistic.endswith(("gram", "pair_energy")):
            continue
        bad = total.clone()
        bad.flatten()[0] = broken
        spoiled = replace(case, sums=case.sums | {statistic: bad})
        tap = statistic.partition(".")[0]
        if not uses(name, shape, statistic):
            compressed(name, spoiled, form, options)
            continue
        with pytest.raises(NumericsError, match=f"tap {tap}.*NaN or infinite"):
            compressed(name, spoiled, form, options)


def uses(name, shape, statistic):
    wanted = methods.spec(name).statistics(shape, own_options(name))
    return statistic in {str(s) for s in wanted}
