"""One small sound model, and a copy of it for every test to break."""

import json
import shutil

import pytest

from actors.storage.sources import embedded_model
from tests.bad_input.refusals import attempt, refusal
from tests.builders import save_model


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """A random model with the tokenizer of the embedded one; never written to."""
    folder = save_model(tmp_path_factory.mktemp("sound") / "model", vocab_size=512)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder)
    attempt(folder, folder / "run")  # what it imports counts against no case
    return folder


@pytest.fixture
def model(sound, tmp_path):
    """A copy of the sound model."""
    return shutil.copytree(sound, tmp_path / "model")


@pytest.fixture
def refused(model, tmp_path):
    """Return a function that passes the door with the model, and returns why that is refused."""

    def call(error_class, *words, **recipe):
        return refusal(error_class, lambda: attempt(model, tmp_path / "run", **recipe), *words)

    return call


@pytest.fixture
def edit(model):
    """Return a function that changes keys of one of the model's JSON files; None removes one."""

    def change(name, **changes):
        path = model / name
        values = {**json.loads(path.read_text()), **changes} if path.exists() else changes
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not ABSENT}))

    return change


ABSENT = object()


@pytest.fixture
def canary(tmp_path):
    """A file that exists once anything of the input was executed."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "something of the input was executed"
