"""A compressed checkpoint that comes back: as broken as any other input."""

import contextlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from orchestrator.prepare.standalone_evaluation import prepare_evaluation
from orchestrator.recipe.reading import load_config
from planners.errors import CompressionError, ModelError
from tests.bad_input.refusals import attempt, refusal
from tests.bad_input.warm import in_new_process
from tests.builders import compress_local, layer_file


@pytest.fixture(scope="session")
def compressed(sound, tmp_path_factory):
    """The result of a run on the sound model."""
    out = tmp_path_factory.mktemp("compressed") / "run"
    compress_local(sound, out)
    return out / "model"


@pytest.fixture
def model(compressed, tmp_path):
    """A copy of the compressed model."""
    return shutil.copytree(compressed, tmp_path / "model")


@pytest.fixture
def refused(model, sound):
    """Return a function that evaluates the model, and returns why that is refused."""
    tokens = f"tokens:{sound}/tokens/evaluation.safetensors"

    def call(error_class, *words):
        def evaluate():
            overrides = {"model": str(model), "device": "cpu", "evaluation.source": tokens}
            return prepare_evaluation(load_config(None, overrides))

        return refusal(error_class, evaluate, *words) if error_class else evaluate()

    return call


@pytest.fixture
def form(model, edit):
    """Return a function that changes the form of the first layer."""

    def change(**keys):
        forms = json.loads((model / "config.json").read_text())["layer_forms"]
        edit("config.json", layer_forms=[{**forms[0], **keys}, *forms[1:]])

    return change


def test_a_sound_result_is_evaluated(refused):
    assert len(refused(None).ids) == 7


def test_a_compressed_model_is_not_compressed_again(model, sound, tmp_path):
    tokens = f"tokens:{sound}/tokens/calibration.safetensors"
    data = {"calibration__source": tokens, "evaluation__source": tokens}
    refusal(
        ModelError,
        lambda: attempt(model, tmp_path / "run", **data),
        "is already a compressed model",
    )


@pytest.mark.parametrize("forms", [None, 3, [], [1, 2, 3], [{}, {}, {}], "forms", {"a": 1}])
def test_layers_without_forms_are_refused(refused, edit, forms):
    edit("config.json", layer_forms=forms)
    refused(ModelError, "config.json: transformers cannot build this model")


@pytest.mark.parametrize("width", [-8, "8", None, 1.5, []])
def test_a_form_of_impossible_widths_is_refused(refused, form, width):
    form(residual_in=width)
    refused(ModelError, "config.json: ")


@pytest.mark.parametrize("key", ["residual_in", "residual_mid", "intermediate", "qk_head_dim"])
def test_a_form_of_other_widths_is_refused_by_the_tensor(refused, form, key):
    form(**{key: 2**24})
    refused(ModelError, "config.json: requires tensor model.layers.0.", "in the weights it is ")


def test_a_missing_layer_file_is_refused_by_name(refused, model):
    path = layer_file(model, 1)
    path.unlink()
    refused(ModelError, f"refers to {path.name}, which does not exist")


def test_a_layer_file_in_the_place_of_another_is_refused(refused, model):
    first, second = layer_file(model, 0), layer_file(model, 1)
    shutil.copy(first, second)
    refused(ModelError, "'model.layers.0.", f"is in both {first.name} and {second.name}")


def test_the_model_it_was_made_from_must_be_supported(refused, edit):
    edit("config.json", compressed_from="bert")
    refused(ModelError, "model_type 'bert' is not supported")
    edit("config.json", compressed_from=["llama"])
    refused(ModelError, "is ['llama']; it must be one of: ")


def test_code_in_its_directory_is_not_run(refused, model, canary):
    (model / "modeling_compressed.py").write_text(f"open({str(canary)!r}, 'w')\n")
    assert refused(None).subject.uri == str(model)


def test_code_in_its_directory_is_not_run_where_it_is_loaded_as_users_do(model, tmp_path):
    # No canary here: this is known to be executed.
    ran = tmp_path / "ran"
    code = model / "modeling_compressed.py"
    code.write_text(f"open({str(ran)!r}, 'w').close()\n{code.read_text()}")
    in_new_process(load_as_users_do, str(model))
    assert not ran.exists()


def load_as_users_do(uri):
    from actors.messages import VerifyRequest
    from actors.worker.evaluator import Evaluator

    ids = [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    request = VerifyRequest(uri=uri, family="llama", tensors={}, ids=ids, whole=True)
    with contextlib.suppress(CompressionError):
        Evaluator(1, "cpu").verify("verify", request)


@pytest.fixture(scope="session")
def narrow(sound, tmp_path_factory):
    """A result whose query and key heads kept some of their pairs."""
    out = tmp_path_factory.mktemp("narrow") / "run"
    compress_local(
        sound, out, method="modegpt", keep_fraction=0.9, options={"allocation": "uniform"}
    )
    return out / "model"


def test_pairs_as_they_were_written_are_taken(narrow, tmp_path, sound):
    assert broken_pairs(narrow, tmp_path, sound, lambda pairs: pairs) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pairs: pairs + 4, "has pair"),
        (lambda pairs: pairs - 4, "has pair -"),
        (lambda pairs: pairs * 2**40, "has pair"),
        (lambda pairs: pairs * 0, "has a pair twice"),
        (lambda pairs: pairs.float(), "must be I64"),
        (lambda pairs: pairs.int(), "must be I64"),
    ],
)
def test_pairs_that_are_none_are_refused(narrow, tmp_path, sound, change, words):
    said = broken_pairs(narrow, tmp_path, sound, change)
    assert words in said
    assert "rope_pairs" in said


def broken_pairs(narrow, tmp_path, sound, change):
    """Return why a result with other pairs in its first layer is refused."""
    model = shutil.copytree(narrow, tmp_path / "model")
    path = layer_file(model, 0)
    tensors = load_file(path)
    (name,) = [key for key in tensors if key.endswith("rope_pairs")]
    assert tensors[name].shape[1] > 1
    save_file({**tensors, name: change(tensors[name])}, path, metadata={"format": "pt"})
    tokens = f"tokens:{sound}/tokens/evaluation.safetensors"

    def evaluate():
        overrides = {"model": str(model), "device": "cpu", "evaluation.source": tokens}
        return prepare_evaluation(load_config(None, overrides))

    if change(tensors[name]) is tensors[name]:
        evaluate()
        return None
    return refusal(ModelError, evaluate)
