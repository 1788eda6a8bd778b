"""Layers of the teacher in the student's place: they compute what they do in the teacher."""

import pytest
import torch

from actors.storage.checkpoint import Checkpoint
from actors.training.adapters import Adapters
from actors.training.distillation import Distillation
from actors.training.group import Alone
from actors.training.lessons import Lessons
from actors.training.replacement import Replacement
from actors.training.trained import Tensors, linears_of
from actors.training.whole_model import WholeModel
from planners.recovery import Place, Recovery
from tests.builders import LENGTH, VOCABULARY, compress_local, save_model

ALL = Place(trial=-1, step=0, steps=8)
LAYERS = ["model.layers.0.", "model.layers.1.", "model.layers.2."]


class NoneCompressed:
    """A recovery in which every changed layer is replaced, which no real one allows."""

    def compressed_layers(self, place, layers):
        del place, layers
        return []


def recovery(**more):
    given = {"mode": "global", "steps": 8, "batch": 4, "parts": 2, "rates": (0.01,), "held_out": 2,
             "replace": "constant", "seed": 1}  # fmt: skip
    return Recovery(**{**given, **more})


def ids():
    drawn = torch.Generator().manual_seed(1)
    return torch.randint(2, VOCABULARY, (10, LENGTH), generator=drawn)


def loaded(folder, dtype=torch.float32, products=None):
    return WholeModel(Checkpoint(str(folder)), dtype=dtype, device="cpu", products=products)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=3)


def changed(model):
    """Return the model with other values in its layers."""
    generator = torch.Generator().manual_seed(7)
    for layer in model.layers.values():
        for each in layer.parameters():
            each.data += 0.05 * torch.randn(each.shape, generator=generator)
    return model


def hidden(student, teacher, replacement, place=ALL):
    with torch.no_grad():
        wanted = teacher.hidden(ids())
        with replacement.standing(place):
            replaced = student.hidden(ids())
        return wanted, replaced, student.hidden(ids())


@pytest.mark.parametrize("model_type", ["llama", "opt", "phi", "cohere", "qwen3"])
def test_with_all_layers_of_the_teacher_the_student_is_the_teacher(tmp_path, model_type):
    folder = save_model(tmp_path, model_type=model_type)
    student, teacher = changed(loaded(folder)), loaded(folder)
    replacement = Replacement(student, teacher, list(student.layers), NoneCompressed(), shared={})
    wanted, replaced, after = hidden(student, teacher, replacement)
    assert torch.equal(replaced, wanted)
    assert not torch.allclose(after, wanted, atol=1e-2)


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_teacher_in_16_bits_stands_in_a_stream_of_32(tmp_path, model_type):
    folder = save_model(tmp_path, model_type=model_type)
    student = changed(loaded(folder, products=torch.bfloat16))
    teacher = loaded(folder, torch.bfloat16)
    replacement = Replacement(student, teacher, list(student.layers), NoneCompressed(), shared={})
    wanted, replaced, after = hidden(student, teacher, replacement)
    assert replaced.dtype == after.dtype
    near, far = ((each.float() - wanted.float()).square().mean() for each in (replaced, after))
    assert near < 0.01 * far


@pytest.mark.parametrize("options", [{"servable": "narrow_heads"}, {}])
def test_layers_with_wider_heads_than_the_students_have_their_own_positions(
    llama, tmp_path, options
):
    options = {"modules": "mlp,qk,vo", **options}
    compress_local(llama, tmp_path / "run", method="modegpt", keep_fraction=0.6, options=options)
    student, teacher = loaded(tmp_path / "run" / "model"), loaded(llama)
    replacement = Replacement(student, teacher, LAYERS, NoneCompressed(), shared={})
    wanted, replaced, after = hidden(student, teacher, replacement)
    assert torch.equal(replaced, wanted)
    assert not torch.allclose(after, wanted, atol=1e-2)


def test_a_shared_tensor_takes_part_as_long_as_one_layer_that_uses_it_does(llama):
    student, teacher = loaded(llama), loaded(llama)
    q = "model.layers.{}.self_attn.q_proj.first.weight".format
    how = recovery(steps=32)
    replacement = Replacement(student, teacher, LAYERS, how, shared={q(1): q(0)})
    seen = set()
    for step in range(16):
        place = Place(trial=-1, step=step, steps=32)
        drawn = how.compressed_layers(place, [0, 1, 2])
        with replacement.standing(place) as is_absent:
            assert is_absent(q(0)) == (not {0, 1} & {*drawn})
            assert is_absent(q(2)) == (2 not in drawn)
            seen.add((is_absent(q(0)), 0 in drawn))
    assert seen == {(True, False), (False, False), (False, True)}


def lessons_of(folder, how):
    student, teacher = changed(loaded(folder)), loaded(folder)
    if how.trains == "lora":
        linears = {p + n: each for p, layer in student.layers.items()
                   for n, each in linears_of(layer).items()}  # fmt: skip
        trained = Adapters(linears, how)
    else:
        names = [name for name, _ in student.module.named_parameters() if "layers" in name]
        trained = Tensors(student.module, names, how)
    source = Distillation(student, teacher, ids())
    replaces = Replacement(student, teacher, LAYERS, how, shared={}).standing
    lessons = Lessons(source, trained, how, Alone(), num_sequences=10, replaces=replaces)
    return lessons, list(trained.parameters)


@pytest.mark.parametrize("trains", ["all", "lora"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_only_layers_that_were_drawn_have_gradients_whatever_the_parts(llama, parts, trains):
    how = recovery(parts=parts, trains=trains)
    lessons, names = lessons_of(llama, how)
    seen = set()
    for step in range(8):
        place = Place(trial=-1, step=step, steps=8)
        left = recovery().compressed_layers(place, [0, 1, 2])
        seen.add(tuple(left))
        gradients, _ = lessons.gradient(place)
        assert all(g is None or g.isfinite().all() for g in gradients)
        pairs = zip(names, gradients, strict=True)
        drawn = {int(name.split(".")[2]) for name, each in pairs if each is not None}
        assert sorted(drawn) == left
    assert len(seen) > 2


def test_held_out_losses_are_those_without_replacement(llama):
    replaced, _ = lessons_of(llama, recovery())
    plain, _ = lessons_of(llama, recovery(replace="none"))
    for _ in range(2):
        assert replaced.held_out_loss() == plain.held_out_loss()
        replaced.gradient(ALL)


def test_the_loss_of_a_step_is_that_of_the_model_with_the_teachers_layers(llama):
    (replaced, _), (plain, _) = (lessons_of(llama, recovery(replace=how))
                                 for how in ("constant", "none"))  # fmt: skip
    step = next(s for s in range(4) if len(recovery().compressed_layers(
        Place(trial=-1, step=s, steps=8), [0, 1, 2])) == 1)  # fmt: skip
    place = Place(trial=-1, step=step, steps=8)
    assert replaced.gradient(place)[1] < plain.gradient(place)[1]
    last = Place(trial=-1, step=7, steps=8)
    for one, other in zip(replaced.gradient(last)[0], plain.gradient(last)[0], strict=True):
        assert torch.equal(one, other)
