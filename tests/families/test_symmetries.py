"""A random element of the group of every space that a family file claims leaves the logits as is.

That is what the methods rely on, and what a wrong name, a wrong order of rope pairs or a forgotten
1 + w breaks.
"""

from dataclasses import replace

import pytest
import torch

from planners.model.layer import SPACES
from tests.families.tiny import MODEL_TYPES, config_of, ids_of, logits_of, model_of, shape_of


class Model:
    """A state dict by roles."""

    def __init__(self, state, family, shape):
        self.state, self.family, self.shape = state, family, shape

    def kind(self, layer):
        return self.shape.kinds[self.shape.kind_of[layer]]

    def name(self, layer, role, part="weight"):
        return f"{self.family.layer.format(i=layer)}.{self.family.below_layer(role)}.{part}"

    def get(self, layer, role, part="weight"):
        return self.state.get(self.name(layer, role, part))

    def set(self, layer, role, value, part="weight"):
        assert self.name(layer, role, part) in self.state
        self.state[self.name(layer, role, part)] = value

    def rows(self, layer, role, map_):
        """Apply a map to what a linear writes."""
        self.set(layer, role, map_ @ self.get(layer, role))
        if self.get(layer, role, "bias") is not None:
            self.set(layer, role, map_ @ self.get(layer, role, "bias"), "bias")


def random(*dims):
    return torch.randn(*dims, dtype=torch.float64)


def orthogonal(dim, *, fixes_mean):
    """Return a random rotation; where LayerNorms subtract the mean, one of the other directions."""
    if not fixes_mean:
        return torch.linalg.qr(random(dim, dim))[0]
    ones = torch.ones(dim, 1, dtype=torch.float64)
    axes = torch.linalg.qr(torch.cat((ones, random(dim, dim - 1)), dim=1))[0]
    rotation = torch.block_diag(torch.ones(1, 1), torch.linalg.qr(random(dim - 1, dim - 1))[0])
    return axes @ rotation.to(axes) @ axes.T


def fold(model, names, norm, readers, rotation):
    """Move the scale of a norm into the weights that read it, and rotate these and its bias."""
    weight, bias = (model.state.get(f"{names}.{part}") for part in ("weight", "bias"))
    scale = torch.ones(len(rotation)).to(rotation) if weight is None else weight + norm.plus_one
    for reader in readers:
        model.state[reader] = model.state[reader] * scale @ rotation
    if weight is not None:
        model.state[f"{names}.weight"] = torch.full_like(weight, 1 - norm.plus_one)
    if bias is not None:
        model.state[f"{names}.bias"] = (bias / scale) @ rotation


def rotate_residual(model):
    """Rotate the residual stream; the head is untied by the caller."""
    family, shape = model.family, model.shape
    layered = "layer" in {norm.kind for kind in shape.kinds for norm in kind.norms}
    rotation = orthogonal(shape.hidden, fixes_mean=layered)
    for table in filter(None, (family.embedding, family.positions)):
        model.state[table] = model.state[table] @ rotation
    for layer in range(shape.num_layers):
        kind = model.kind(layer)
        for norm in kind.norms:
            if norm.over != "head":
                readers = [model.name(layer, role) for role in kind.readers(norm.role)]
                name = model.name(layer, norm.role).removesuffix(".weight")
                fold(model, name, norm, readers, rotation)
        for linear in kind.linears:
            if linear.writes.startswith("residual"):
                model.rows(layer, linear.role, rotation.T)
    name = family.final_norm.removesuffix(".weight")
    fold(model, name, shape.final_norm, [family.head], rotation)


def permute_mlp(model):
    for layer in range(model.shape.num_layers):
        order = torch.eye(model.shape.intermediate, dtype=torch.float64)
        order = order[torch.randperm(len(order))]
        for linear in model.kind(layer).linears:
            if linear.writes == "ffn":
                model.rows(layer, linear.role, order)
        model.set(layer, "down_proj", model.get(layer, "down_proj") @ order.T)


def per_head(maps, group):
    """Return the block diagonal map of query heads from one of each KV head."""
    return torch.block_diag(*(each for each in maps for _ in range(group)))


def mix_values(model):
    shape = model.shape
    group = shape.num_heads // shape.num_kv_heads
    for layer in range(shape.num_layers):
        maps = [random(shape.head_dim, shape.head_dim) for _ in range(shape.num_kv_heads)]
        model.rows(layer, "v_proj", torch.block_diag(*maps))
        back = per_head([each.inverse() for each in maps], group)
        model.set(layer, "o_proj", model.get(layer, "o_proj") @ back)


def scaled_pairs(kind, head_dim):
    """Return a map of a query head and that of the key head which undoes it in the scores."""
    q, k = torch.eye(head_dim).double(), torch.eye(head_dim).double()
    pairs = kind.rotary // 2
    for pair in range(pairs):
        first, second = (pair, pair + pairs) if kind.pairs == "half" else (2 * pair, 2 * pair + 1)
        a, b = random(2).tolist()
        index = torch.tensor([first, second])
        turn = torch.tensor([[a, -b], [b, a]]).double()
        q[index[:, None], index] = turn
        k[index[:, None], index] = turn.inverse().T
    if kind.rotary < head_dim:
        rest = random(head_dim - kind.rotary, head_dim - kind.rotary)
        q[kind.rotary :, kind.rotary :] = rest
        k[kind.rotary :, kind.rotary :] = rest.inverse().T
    return q, k


def scale_pairs(model):
    shape = model.shape
    group = shape.num_heads // shape.num_kv_heads
    for layer in range(shape.num_layers):
        kind = model.kind(layer)
        maps = [scaled_pairs(kind, shape.head_dim) for _ in range(shape.num_kv_heads)]
        model.rows(layer, "q_proj", per_head([q for q, _ in maps], group))
        model.rows(layer, "k_proj", torch.block_diag(*(k for _, k in maps)))


APPLY = {"residual": rotate_residual, "mlp": permute_mlp, "vo": mix_values, "qk": scale_pairs}
# Stock RMS norms and rope compute in float32.
TOLERANCE = {"residual": 1e-5, "qk": 1e-5, "mlp": 1e-10, "vo": 1e-10}


def moved(config, space, *, family=None, shape=None):
    """Return how far the logits move, relative to their size, where the group acts on a space."""
    found, read = shape_of(config)
    family, shape = family or found, shape or read
    dense = model_of(config)
    before = logits_of(dense, ids_of())
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    acted = Model(state, family, shape)
    torch.manual_seed(1)
    APPLY[space](acted)
    untied = type(config)(**{**config.to_dict(), "tie_word_embeddings": False})
    model = model_of(untied)
    model.load_state_dict(acted.state, strict=True)
    return float((logits_of(model, ids_of()) - before).abs().max() / before.abs().max())


def claims(model_type, space):
    _, shape = shape_of(config_of(model_type))
    return all(kind.space(space).group != "none" for kind in shape.kinds)


CLAIMED = [(t, space) for t in MODEL_TYPES for space in SPACES if claims(t, space)]


@pytest.mark.parametrize(("model_type", "space"), CLAIMED)
def test_the_group_of_a_space_leaves_the_logits_unchanged(model_type, space):
    for tied in (False, True) if space == "residual" else (False,):
        assert moved(config_of(model_type, tied=tied), space) < TOLERANCE[space]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_space_without_a_group_has_a_reason(model_type):
    _, shape = shape_of(config_of(model_type))
    for kind in shape.kinds:
        for name in SPACES:
            space = kind.space(name)
            assert (space.group == "none") == bool(space.reason)


def with_kinds(shape, **changes):
    return replace(shape, kinds=tuple(replace(kind, **changes) for kind in shape.kinds))


def with_norms(shape, **changes):
    kinds = (
        replace(kind, norms=tuple(replace(norm, **changes) for norm in kind.norms))
        for kind in shape.kinds
    )
    return replace(shape, kinds=tuple(kinds), final_norm=replace(shape.final_norm, **changes))


@pytest.mark.parametrize("model_type", ["llama", "helium", "phi", "cohere"])
def test_the_wrong_order_of_rope_pairs_is_found(model_type):
    config = config_of(model_type)
    _, shape = shape_of(config)
    other = "half" if shape.kinds[0].pairs == "interleaved" else "interleaved"
    assert moved(config, "qk", shape=with_kinds(shape, pairs=other)) > 1e-3


def test_rope_of_all_channels_where_it_rotates_a_part_is_found():
    config = config_of("phi")
    _, shape = shape_of(config)
    assert moved(config, "qk", shape=with_kinds(shape, rotary=shape.head_dim)) > 1e-3


def test_a_layer_with_rope_that_is_taken_for_one_without_is_found():
    config = config_of("smollm3")
    _, shape = shape_of(config)
    assert moved(config, "qk", shape=replace(shape, own_kinds=shape.kind_of[::-1])) > 1e-3


@pytest.mark.parametrize(("model_type", "plus_one"), [("gemma", False), ("llama", True)])
def test_a_wrong_one_plus_the_weight_of_a_norm_is_found(model_type, plus_one):
    config = config_of(model_type)
    _, shape = shape_of(config)
    assert moved(config, "residual", shape=with_norms(shape, plus_one=plus_one)) > 1e-3


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_swapped_names_of_norms_are_found(model_type):
    config = config_of(model_type)
    family, _ = shape_of(config)
    norms = {"attn_norm": family.norms["mlp_norm"], "mlp_norm": family.norms["attn_norm"]}
    assert moved(config, "residual", family=replace(family, norms=norms)) > 1e-3


def test_a_serial_layer_that_is_taken_for_a_parallel_one_is_found():
    config = config_of("starcoder2")
    _, shape = shape_of(config)
    one_norm = with_kinds(shape, norms=shape.kinds[0].norms[:1])
    assert moved(config, "residual", shape=one_norm) > 1e-3
