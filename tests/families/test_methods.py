"""Every method on a tiny model of every type, by the functions that workers call."""

import pytest
import torch

from actors import methods
from actors.modeling.travelling import classes
from actors.statistics.observe import LayerStatistics
from orchestrator.prepare.model_config import result_config
from orchestrator.recipe.method_options import resolve_options
from planners.method import Target
from planners.model.cost import dense_model_form, dense_start, model_parameters
from planners.model.form import site_dims
from planners.model.taps import layer_statistics
from tests.families.tiny import MODEL_TYPES, config_of, ids_of, logits_of, model_of, shape_of

OPTIONS = {
    "modegpt": {"allocation": "uniform", "round_to": 2},
    "slicegpt": {"slice_head": True, "round_to": 2},
    "svdllm": {},
}


class Dense:
    """A dense model with its statistics over some tokens."""

    def __init__(self, model_type, *, tied=False, **changes):
        self.config = config_of(model_type, tied=tied, **changes)
        self.model = model_of(self.config)
        self.family, self.shape = shape_of(self.config, "float32")
        self.state = dict(self.model.state_dict())

    def observed(self, wanted):
        """Return the sums of each layer."""
        layers = self.model.get_submodule(self.family.layer.removesuffix(".{i}"))
        found, handles = [], []
        for index, layer in enumerate(layers):
            form = dense_model_form(self.shape).layers[index]
            own = layer_statistics(self.shape, wanted, index)
            sums = LayerStatistics(own, self.shape, self.family, device="cpu", form=form)
            sums.attach(layer)

            def count(_, args, output, sums=sums):
                sums.update_residual(args[0], output[0] if isinstance(output, tuple) else output)

            handles.append(layer.register_forward_hook(count))
            found.append(sums)
        logits_of(self.model, ids_of(1, rows=24))
        for handle, sums in zip(handles, found, strict=True):
            handle.remove()
            sums.detach()
        return [sums.tensors() for sums in found]

    def layer(self, index):
        """Return role -> tensor."""
        prefix = self.family.layer.format(i=index) + "."
        return {
            self.family.role_of(name.removeprefix(prefix)): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix)
        }


def bases_of(method, dense, form, sums):
    """Return site -> basis, as the units find them."""
    found = {}
    last = 2 * dense.shape.num_layers
    for site, dim in site_dims(form).items():
        tap = "resid_out" if site == last else ("resid_attn", "resid_mlp")[site % 2]
        gram = sums[min(site // 2, dense.shape.num_layers - 1)][f"{tap}.gram"]
        found[site] = method.factor(
            [gram], keep_dim=dim, where="", centred=dense.shape.is_centred
        ).vectors
    return found


def outer_state(method, dense, form, bases):
    """Return the tensors outside the layers, rotated if there are bases."""
    family, shape, state = dense.family, dense.shape, dense.state
    names = {family.embedding, family.head, family.positions, *family.norm_tensors(shape)}
    outer = {name: state[name] for name in (*names, family.head_bias) if name in state}
    if not bases:
        return outer
    for table in (family.embedding, family.positions):
        if table:
            outer[table] = method.apply_embedding(state[table], bases[0], shape=shape)
    if form.head_shortcut:
        outer[family.head_shortcut] = method.head_shortcut(
            bases[0], bases[2 * shape.num_layers], shape=shape, norm_weight=state[family.final_norm]
        )
        outer[family.head] = outer[family.embedding]
        del outer[family.final_norm]
        return outer
    outer[family.head] = method.apply_head(
        state[family.head],
        bases[2 * shape.num_layers],
        shape=shape,
        norm_weight=state.get(family.final_norm),
        native=False,
    )
    if form.head_bias:
        moved = torch.zeros(shape.vocab_size, dtype=torch.float64)
        if shape.final_norm.bias:
            moved = method.head_bias(state[family.head], state[family.norm_bias])
        outer[family.head_bias] = moved + state.get(family.head_bias, 0.0)
    for name in family.norm_tensors(shape):
        del outer[name]
    return outer


def compressed(dense, name, target, **changes):
    """Return a model compressed by a method, and its widths."""
    shape, family = dense.shape, dense.family
    method, spec = methods.load(name), methods.spec(name)
    options = resolve_options(spec, {**OPTIONS[name], **changes})
    assert spec.refuses(shape, options) == ""
    form = spec.form(shape, dense_start(shape), target, options)
    sums = dense.observed(spec.statistics(shape, options))
    bases = bases_of(method, dense, form, sums) if spec.residual else {}
    state = outer_state(method, dense, form, bases)
    for index, layer in enumerate(form.layers):
        weights = dense.layer(index)
        if bases:
            ends = bases[2 * index], bases[2 * index + 2]
            sites = (ends[0], bases.get(2 * index + 1, ends[1]), ends[1])
            new = method.apply(weights, sites, shape=shape, form=layer)
        else:
            new, _ = method.compress(weights, sums[index], shape=shape, form=layer, options=options)
        prefix = family.layer.format(i=index) + "."
        state |= {prefix + family.below_layer(role): tensor for role, tensor in new.items()}
    config = result_config(dense.config.to_dict(), shape, form)
    code = classes(shape.model_type)
    kept = {key: value for key, value in config.items() if key not in ("model_type", "dtype")}
    model = code.CompressedForCausalLM(code.CompressedConfig(**kept)).double().eval()
    model.load_state_dict(state, strict=not form.tied)
    return model, form


def distance(model, dense):
    logits = logits_of(dense.model, ids_of())
    return float((logits_of(model, ids_of()) - logits).abs().max() / logits.abs().max())


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_full_width_changes_nothing(model_type, name):
    dense = Dense(model_type)
    target = Target(slice=0.0) if methods.spec(name).residual else Target(keep_fraction=1.0)
    model, _ = compressed(dense, name, target)
    assert distance(model, dense) < 1e-5


@pytest.mark.parametrize("model_type", ["llama", "gemma", "granite"])
def test_a_head_shortcut_keeps_the_head_tied_and_the_logits_at_full_width(model_type):
    dense = Dense(model_type, tied=True)
    model, form = compressed(dense, "slicegpt", Target(slice=0.0), head_shortcut=True)
    assert form.tied
    assert distance(model, dense) < 1e-5
    cut, form = compressed(dense, "slicegpt", Target(slice=0.25), head_shortcut=True)
    stored = sum(parameter.numel() for parameter in cut.parameters())
    assert stored == model_parameters(dense.shape, form)
    untied, other = compressed(dense, "slicegpt", Target(slice=0.25))
    # The same numbers but for the columns of the embedding that the shortcut cannot reach.
    assert distance(cut, dense) < 2 * distance(untied, dense)
    assert model_parameters(dense.shape, other) > stored


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_cut_keeps_what_it_counts_and_generates_as_it_computes(model_type, name):
    dense = Dense(model_type)
    target = Target(slice=0.25) if methods.spec(name).residual else Target(keep_fraction=0.7)
    model, form = compressed(dense, name, target)
    stored = sum(parameter.numel() for parameter in model.parameters())
    assert stored == model_parameters(dense.shape, form)
    assert 1e-5 < distance(model, dense) < 1.5
    ids = ids_of(rows=1, tokens=6)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=True)
        again = model(written[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(written[:, 6:], again[:, 5:])
