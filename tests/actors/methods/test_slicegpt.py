"""SliceGPT: laws of its maths, and the same laws of whole models that it made."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from actors import methods
from actors.methods.slicegpt import shared_gram, site_basis
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors
from orchestrator.recipe.method_options import resolve_options
from planners.method import Target
from planners.model.cost import dense_start
from tests.builders import (
    LENGTH,
    VOCABULARY,
    compress_local,
    logits_of,
    result_files,
    save_model,
)
from tests.shapes import llama_shape

METHOD, SPEC = methods.load("slicegpt"), methods.spec("slicegpt")
TYPES = ("llama", "mistral", "qwen2")
ROTATIONS = ("per_site", "shared")


def random_gram(seed, dim, tokens=50):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, dim, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, dim, dtype=torch.float64)
    return x.T @ x


def token_ids(num_sequences=3):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, VOCABULARY, (num_sequences, LENGTH), generator=generator)


def logits_of_result(out, ids):
    remote = (out / "model" / "modeling_compressed.py").exists()
    return logits_of(out / "model", ids, trust_remote_code=remote)


# Laws of the maths.

GRAMS = st.builds(random_gram, st.integers(0, 2**32), st.integers(1, 24))


@given(GRAMS)
def test_kept_energy_grows_with_the_width_to_all_of_it(gram):
    energies = [site_basis(gram, keep_dim=k, where="").energy_kept for k in range(1, len(gram) + 1)]
    assert energies == sorted(energies)
    assert energies[-1] == pytest.approx(1, abs=1e-12)


@given(GRAMS, st.data())
def test_kept_energy_is_the_share_of_the_tokens_that_the_kept_axes_hold(gram, data):
    keep_dim = data.draw(st.integers(1, len(gram)))
    basis = site_basis(gram, keep_dim=keep_dim, where="")
    held = (basis.vectors.T @ gram @ basis.vectors).trace() / gram.trace()
    assert basis.energy_kept == pytest.approx(float(held), rel=1e-9)


@given(GRAMS, st.data())
def test_a_narrower_basis_is_the_beginning_of_a_wider_one(gram, data):
    keep_dim = data.draw(st.integers(1, len(gram)))
    narrow, full = (site_basis(gram, keep_dim=k, where="") for k in (keep_dim, len(gram)))
    assert torch.equal(narrow.vectors, full.vectors[:, :keep_dim])


@given(st.integers(0, 2**32), st.lists(st.floats(1e-3, 1e6), min_size=2, max_size=5))
def test_no_site_outweighs_another_in_a_shared_basis(seed, sizes):
    grams = [random_gram(seed + i, 6) for i in range(len(sizes))]
    scaled = [gram * size for gram, size in zip(grams, sizes, strict=True)]
    assert torch.allclose(shared_gram(scaled), shared_gram(grams), rtol=1e-9)


def layer_weights(seed, *, dtype, bias):
    """Return random tensors of one layer: hidden 16, FFN 24, 4 heads of 6 and 2 of keys."""
    generator = torch.Generator().manual_seed(seed)
    dims = {"q_proj": (24, 16), "k_proj": (12, 16), "v_proj": (12, 16), "o_proj": (16, 24),
            "gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}  # fmt: skip
    weights = {f"{n}.weight": torch.randn(d, generator=generator) for n, d in dims.items()}
    if bias:
        weights |= {f"{n}.bias": torch.randn(d[0], generator=generator) for n, d in dims.items()}
    for norm in ("attn_norm.weight", "mlp_norm.weight"):
        weights[norm] = 1 + 0.1 * torch.randn(16, generator=generator)
    return {name: tensor.to(dtype) for name, tensor in weights.items()}


SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=3, hidden=16, intermediate=24, num_heads=4,
    num_kv_heads=2, head_dim=6, vocab_size=20, tied=False,
)  # fmt: skip


@given(
    st.integers(0, 2**32),
    st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    st.booleans(),
    st.sampled_from(ROTATIONS),
)
def test_weights_keep_their_dtype_and_the_inputs_are_not_changed(seed, dtype, bias, rotation):
    weights = layer_weights(seed, dtype=dtype, bias=bias)
    options = resolve_options(SPEC, {"rotation": rotation, "round_to": 4})
    form = SPEC.form(SHAPE, dense_start(SHAPE), Target(slice=0.25), options)
    count = 3 if rotation == "per_site" else 1
    bases = [
        METHOD.factor([random_gram(seed + i, 16)], keep_dim=12, where="").vectors
        for i in range(count)
    ]
    bases = (bases[0], bases[len(bases) // 2], bases[-1])
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    inputs = {**weights, "rows": rows, "a": bases[0], "b": bases[1], "c": bases[2]}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    new = METHOD.apply(weights, bases, shape=SHAPE, form=form.layers[0])
    new["embedding"] = METHOD.apply_embedding(rows, bases[0], shape=SHAPE)
    new["head"] = METHOD.apply_head(
        rows,
        bases[2],
        shape=SHAPE,
        norm_weight=weights["mlp_norm.weight"],
        native=form.native,
    )
    assert {tensor.dtype for tensor in new.values()} == {dtype}
    assert [name for name in before if not torch.equal(before[name], inputs[name])] == []
    own = {tensor.data_ptr() for tensor in new.values()}
    assert not own & {tensor.data_ptr() for tensor in inputs.values()}


# The same laws of whole models.


@pytest.fixture(
    scope="module", params=[(t, tied) for t in TYPES for tied in (False, True)], ids=str
)
def model(request, tmp_path_factory):
    """Return a checkpoint of every type, with heads that are no part of the hidden width."""
    model_type, tied = request.param
    folder = tmp_path_factory.mktemp(model_type)
    heads = {} if model_type == "qwen2" else {"head_dim": 12}
    return save_model(folder, model_type=model_type, tie_word_embeddings=tied, **heads)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_full_width_changes_nothing(model, tmp_path, rotation):
    compress_local(model, tmp_path, slice=0.0, options={"rotation": rotation})
    difference = logits_of_result(tmp_path, token_ids()) - logits_of(model, token_ids())
    assert float(difference.abs().max()) < 1e-4


CUTS = (
    {"rotation": "per_site"},
    {"rotation": "per_site", "slice_head": True},
    {"rotation": "per_site", "pca_on": "normed"},
    {"rotation": "shared"},
)


@pytest.mark.parametrize("options", CUTS, ids=str)
def test_slicing_is_projecting_the_residual_stream_of_the_dense_model(model, tmp_path, options):
    compress_local(model, tmp_path, slice=0.25, options=options)
    expected = projected_logits(model, stored_bases(tmp_path), token_ids())
    found = logits_of_result(tmp_path, token_ids())
    assert float((found - expected).abs().max()) < 1e-4
    # A cut that changes nothing would prove nothing.
    assert float((found - logits_of(model, token_ids())).abs().max()) > 1e-2


def stored_bases(out):
    """Return the basis of each site, (hidden, keep)."""
    folder = Directory(str(out))
    names = folder.names("basis")
    bases = [read_tensors(folder, name)["vectors"] for name in names]
    return bases * 7 if len(bases) == 1 else bases


@torch.inference_mode()
def projected_logits(folder, bases, ids):
    """Return logits of the dense model whose residual stream keeps to the span of the bases."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    inner = model.model
    projections = iter([basis @ basis.T for basis in bases])
    hidden = inner.embed_tokens(ids) @ next(projections)
    angles = inner.rotary_emb(hidden, position_ids=torch.arange(ids.shape[1])[None])
    for layer in inner.layers:
        attended, _ = layer.self_attn(
            layer.input_layernorm(hidden), position_embeddings=angles, attention_mask=None
        )
        hidden = (hidden + attended) @ next(projections)
        hidden = (hidden + layer.mlp(layer.post_attention_layernorm(hidden))) @ next(projections)
    return model.lm_head(inner.norm(hidden))


def test_one_rotation_gives_a_stock_model(model, tmp_path):
    compress_local(model, tmp_path, slice=0.25, options={"rotation": "shared"})
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (model, tmp_path / "model")
    )
    assert after["model_type"] == before["model_type"]
    assert after["hidden_size"] == 24
    assert "auto_map" not in after
    assert [name for name in result_files(tmp_path) if name.endswith(".py")] == []
    assert torch.isfinite(logits_of(tmp_path / "model", token_ids())).all()


def principal_axes(hidden_states, keep_dim):
    tokens = hidden_states.flatten(0, 1)
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -keep_dim:]


@pytest.mark.parametrize("pca_on", ["residual", "normed"])
def test_the_kept_axes_are_those_of_the_dense_residual_stream(tmp_path, pca_on):
    model = save_model(tmp_path / "model")
    compress_local(model, tmp_path / "run", slice=0.25, options={"pca_on": pca_on})
    path = model / "tokens" / "calibration.safetensors"
    ids = read_tensors(Directory(str(path.parent)), path.name)["input_ids"]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    seen = []
    for layer in dense.model.layers:
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
    dense.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        dense(ids)
    for site, (basis, states) in enumerate(zip(stored_bases(tmp_path / "run"), seen, strict=True)):
        tokens = states
        if pca_on == "normed":
            tokens = states / states.square().mean(dim=-1, keepdim=True).sqrt()
        expected = principal_axes(tokens, basis.shape[1])
        # Both span the same space: one projected on the other loses nothing.
        lost = basis - expected @ (expected.T @ basis)
        assert float(lost.norm()) < 1e-4, f"site {site}"


def test_a_sharded_checkpoint_in_half_precision_gives_what_its_single_file_gives(tmp_path):
    single, sharded = (
        save_model(tmp_path / name, dtype=torch.bfloat16, max_shard_size=size)
        for name, size in (("single", "1GB"), ("sharded", "20KB"))
    )
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    results = []
    for model in (single, sharded):
        tokens = {split: {"source": f"tokens:{single}/tokens/{split}.safetensors"}
                  for split in ("calibration", "evaluation")}  # fmt: skip
        out = tmp_path / f"run-{model.name}"
        compress_local(model, out, **tokens)
        results.append(Checkpoint(str(out / "model")))
    one, other = results
    assert one.locations.keys() == other.locations.keys()
    for name in one.locations:
        assert one.read(name).dtype == torch.bfloat16
        assert torch.equal(one.read(name), other.read(name))


def test_half_precision_keeps_the_logits_at_full_width(tmp_path):
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    out = tmp_path / "run"
    compress_local(model, out, slice=0.0)
    dense, found = logits_of(model, token_ids()), logits_of_result(out, token_ids())
    assert float((found - dense).abs().max()) < 0.05 * float(dense.abs().max())
