"""What a model's config says of the sequences that it takes."""

import json

import pytest

from orchestrator.prepare.prepare import longest_sequence
from orchestrator.prepare.standalone_evaluation import prepare_evaluation
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError
from tests.builders import prepared_run, save_model, save_tokens


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    save_model(folder, model_type="mistral", max_position_embeddings=6000, num_hidden_layers=1)
    save_tokens(folder / "long.safetensors", 2, length=5000)
    return folder


def says(folder, **changes):
    path = folder / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k != "sliding_window"}
    path.write_text(json.dumps({**config, **changes}))


def long_run(folder):
    return prepared_run(folder, folder / "run", calibration={"source": f"tokens:{folder}/long.safetensors"})  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, r"5000 tokens, but the model accepts at most 4096 \(sliding_window\)"),
        ({"sliding_window": 512}, r"at most 512 \(sliding_window\)"),
        ({"sliding_window": None, "max_position_embeddings": 4999},
         r"at most 4999 \(max_position_embeddings\)"),
    ],
)  # fmt: skip
def test_the_window_of_a_mistral_bounds_its_sequences_and_is_named(mistral, changes, words):
    says(mistral, **{"max_position_embeddings": 6000, **changes})
    with pytest.raises(ConfigError, match=words):
        long_run(mistral)


def test_sequences_past_the_window_are_not_evaluated_as_if_there_were_none(mistral):
    says(mistral, sliding_window=512, max_position_embeddings=6000)
    given = {"model": str(mistral), "device": "cpu",
             "evaluation.source": f"tokens:{mistral}/long.safetensors"}  # fmt: skip
    with pytest.raises(ConfigError, match=r"5000 tokens, .* at most 512 \(sliding_window\)"):
        prepare_evaluation(load_config(None, given))
    says(mistral, sliding_window=None, max_position_embeddings=6000)
    assert prepare_evaluation(load_config(None, given)).ids.shape == (2, 5000)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (100, "max_position_embeddings")),
        ({"model_type": "llama", "max_position_embeddings": ...},
         (2048, "max_position_embeddings")),
        ({"model_type": "mistral", "sliding_window": 8}, (8, "sliding_window")),
        ({"model_type": "mistral", "max_position_embeddings": ...}, (4096, "sliding_window")),
        ({"model_type": "qwen2", "sliding_window": 8}, (100, "max_position_embeddings")),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
          "max_window_layers": 2}, (8, "sliding_window")),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
          "max_window_layers": 3}, (100, "max_position_embeddings")),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True,
          "layer_types": ["full_attention"] * 3}, (100, "max_position_embeddings")),
    ],
)  # fmt: skip
def test_the_longest_sequence_is_bounded_by_windows_of_layers_that_have_one(config, longest):
    config = {"num_hidden_layers": 3, "max_position_embeddings": 100, **config}
    assert longest_sequence({k: v for k, v in config.items() if v is not ...}) == longest


def test_a_mistral_that_says_it_has_no_window_has_none(mistral):
    says(mistral, sliding_window=None, max_position_embeddings=6000)
    assert long_run(mistral).plan.calibration_tokens == 10_000
