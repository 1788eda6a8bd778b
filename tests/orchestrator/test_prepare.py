"""What a model's config says of the sequences that it takes."""

import json

import pytest
from transformers import AutoModelForCausalLM

from orchestrator.prepare.prepare import longest_sequence
from orchestrator.prepare.standalone_evaluation import prepare_evaluation
from orchestrator.recipe.reading import load_config
from planners.errors import ConfigError, ModelError
from tests.builders import VOCABULARY, prepared_run, save_model, save_tokens
from tests.families.tiny import config_of


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


def test_sequences_are_no_longer_than_the_positions_that_a_model_knows(mistral):
    says(mistral, max_position_embeddings=4999)
    words = r"5000 tokens, but the model accepts at most 4999 \(max_position_embeddings\)"
    with pytest.raises(ConfigError, match=words):
        long_run(mistral)


@pytest.mark.parametrize("window", [{}, {"sliding_window": 512}, {"sliding_window": None}])
def test_sequences_may_be_longer_than_a_window(mistral, window):
    says(mistral, max_position_embeddings=6000, **window)
    assert long_run(mistral).plan.calibration_tokens == 10_000
    given = {"model": str(mistral), "device": "cpu",
             "evaluation.source": f"tokens:{mistral}/long.safetensors"}  # fmt: skip
    assert prepare_evaluation(load_config(None, given)).ids.shape == (2, 5000)


def test_sequences_longer_than_a_table_of_positions_are_not_evaluated(tmp_path):
    config = config_of("opt", max_position_embeddings=40, vocab_size=VOCABULARY)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    save_tokens(tmp_path / "long.safetensors", 2, length=41)
    given = {"model": str(tmp_path), "device": "cpu",
             "evaluation.source": f"tokens:{tmp_path}/long.safetensors"}  # fmt: skip
    with pytest.raises(ConfigError, match="41 tokens, but the model accepts at most 40"):
        prepare_evaluation(load_config(None, given))


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "llama", "max_position_embeddings": 100}, 100),
        ({"model_type": "llama"}, 2048),
        ({"model_type": "mistral"}, 131072),
        ({"model_type": "opt"}, 2048),
        ({"model_type": "mistral", "sliding_window": 8, "max_position_embeddings": 100}, 100),
    ],
)
def test_the_longest_sequence_is_that_of_the_config_or_of_transformers(config, longest):
    assert longest_sequence(config) == longest


def test_a_model_that_says_no_number_for_its_longest_sequence_is_refused():
    with pytest.raises(ModelError, match="max_position_embeddings is None; it must be above 1"):
        longest_sequence({"model_type": "phi", "max_position_embeddings": None})
