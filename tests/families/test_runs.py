"""A whole run of every method on a tiny model of every type: verified, loaded, generated with."""

import pytest

from actors import methods
from tests.builders import VOCABULARY, run_local, save_tokens
from tests.families.tiny import MODEL_TYPES, config_of, model_of

OPTIONS = {
    "basis_sharing": {},
    "deltallm": {"layers": "1", "rank": 2},
    "gptq": {"bits": 4, "group": 32, "uneven": "smaller"},
    "modegpt": {"round_to": 2},
    "slicegpt": {"round_to": 2},
    "svdllm": {},
}
# Types with several kinds of layers, two of each, so that one may share with another.
FOUR = {
    "cohere2": {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 1, 0, 0]},
}
TIED = ("opt", "gemma", "smollm3", "starcoder2", "cohere", "cohere2", "ernie4_5")


@pytest.mark.nightly
@pytest.mark.parametrize("name", methods.available())
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_run_is_ready(model_type, name, tmp_path):
    changes = {"num_hidden_layers": 4, **FOUR[model_type]} if model_type in FOUR else {}
    config = config_of(model_type, tied=model_type in TIED, vocab_size=VOCABULARY, **changes)
    model_of(config).float().save_pretrained(tmp_path / "model")
    save_tokens(tmp_path / "tokens.safetensors", 16, length=32)
    source = {"source": f"tokens:{tmp_path}/tokens.safetensors"}
    given = {"calibration": source, "evaluation": source, "method": name, "options": OPTIONS[name]}
    quantises = methods.spec(name).quantises
    kept = 1.0 if quantises else 0.9 if name == "deltallm" else 0.8
    size = {} if quantises else {"keep_fraction": kept}
    report = run_local(tmp_path / "model", tmp_path / "run", **size, **given)
    assert report["verdict"] == "READY"
    assert report["parameters"]["keep_fraction"] <= kept
    assert report["bytes"]["after"] < report["bytes"]["before"]
