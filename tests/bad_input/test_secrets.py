"""What is secret in the environment stays there: in no file, no output, no error."""

import json

import pyarrow.parquet as pq
import pytest

from tests.bad_input.warm import command_line
from tests.builders import run_local

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAPLANTED0000000",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret+0123456789abcdef",
    "AWS_SESSION_TOKEN": "planted-session-0123456789",
    "HF_TOKEN": "hf_planted0123456789abcdef",
    "RAY_AUTH_TOKEN": "planted-ray-0123456789",
    "MY_PASSWORD": "planted-password-0123456789",
}


@pytest.fixture
def planted(monkeypatch):
    """An environment with secrets."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def leaks(*texts):
    """Return the secrets that are in some of these texts."""
    return [name for name, value in SECRETS.items() if any(value in text for text in texts)]


def contents(folder):
    """Return every file below a folder as text, tables unpacked."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield path.read_bytes().decode("latin-1")
        if path.suffix == ".parquet":
            yield str(pq.read_table(path).to_pylist()) + str(pq.read_metadata(path).metadata)


@pytest.mark.usefixtures("planted")
def test_a_run_writes_and_says_no_secret(sound, tmp_path, capfd):
    events = []
    report = run_local(sound, tmp_path / "out", listener=events.append)
    texts = list(contents(tmp_path / "out"))
    assert len(texts) > 20
    assert leaks(*texts, json.dumps(report), str(events), *capfd.readouterr()) == []


@pytest.mark.parametrize("json_", [[], ["--json"]])
def test_the_command_line_says_no_secret(model, tmp_path, json_):
    (model / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("seed: ${AWS_SECRET_ACCESS_KEY}")
    for arguments in (
        ["run", model],
        ["run", "-r", "recipe.yaml"],
        ["run", "nobody/nothing"],
        ["status", tmp_path / "nothing"],
    ):
        done = command_line([*arguments, *json_], folder=tmp_path, environment=SECRETS)
        assert done.exit_code > 1
        assert leaks(done.stdout, done.stderr) == []


@pytest.mark.parametrize("option", ["model", "out"])
def test_keys_in_an_address_are_not_repeated(model, tmp_path, option):
    address = f"s3://{SECRETS['AWS_ACCESS_KEY_ID']}:{SECRETS['MY_PASSWORD']}@bucket/x"
    arguments = [address] if option == "model" else [model, "--out", address]
    done = command_line(["run", *arguments, "--json"], folder=tmp_path)
    assert done.exit_code == 6
    assert "a URI must not contain credentials" in done.stdout
    assert leaks(done.stdout, done.stderr) == []
