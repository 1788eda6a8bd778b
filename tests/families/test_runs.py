"""A whole run of every method on a tiny model of every type: verified, loaded, generated with."""

import pytest

from actors import methods
from tests.builders import VOCABULARY, run_local, save_tokens
from tests.families.tiny import MODEL_TYPES, config_of, model_of

OPTIONS = {
    "gptq": {"bits": 4, "group": 32, "uneven": "smaller"},
    "modegpt": {"round_to": 2},
    "slicegpt": {"round_to": 2},
    "svdllm": {},
}
TIED = ("opt", "gemma", "smollm3", "starcoder2", "cohere", "cohere2", "ernie4_5")


@pytest.mark.nightly
@pytest.mark.parametrize("name", methods.available())
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_run_is_ready(model_type, name, tmp_path):
    config = config_of(model_type, tied=model_type in TIED, vocab_size=VOCABULARY)
    model_of(config).float().save_pretrained(tmp_path / "model")
    save_tokens(tmp_path / "tokens.safetensors", 16, length=32)
    source = {"source": f"tokens:{tmp_path}/tokens.safetensors"}
    given = {"calibration": source, "evaluation": source, "method": name, "options": OPTIONS[name]}
    quantises = methods.spec(name).quantises
    size = {} if quantises else {"keep_fraction": 0.8}
    report = run_local(tmp_path / "model", tmp_path / "run", **size, **given)
    assert report["verdict"] == "READY"
    assert report["parameters"]["keep_fraction"] <= (1.0 if quantises else 0.8)
    assert report["bytes"]["after"] < report["bytes"]["before"]
