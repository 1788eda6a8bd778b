"""Python has the words of the command line; help does not wait for what a run imports."""

import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

import orchestrator
from orchestrator.cli.main import main
from planners.errors import ConfigError
from tests.builders import LENGTH, save_model


@pytest.mark.ray
@pytest.mark.nightly
def test_compress_is_the_run_of_the_command_line(tmp_path):
    model, out = save_model(tmp_path / "model"), tmp_path / "run"
    tokens = f"tokens:{model}/tokens"
    recipe = {
        "slice": 0.25,
        "out": str(out),
        "device": "cpu",
        "calibration": {
            "source": f"{tokens}/calibration.safetensors",
            "microbatch_tokens": LENGTH,
        },
        "evaluation": {"source": f"{tokens}/evaluation.safetensors"},
    }
    # In a process of its own: a Ray of other tests may be connected to this one.
    program = (
        "import json, sys; from orchestrator import compress; "
        "from orchestrator.cli.main import main; "
        f"print(json.dumps(compress({str(model)!r}, **{recipe!r}))); "
        f"main(['run', '-r', {str(out / 'run.yaml')!r}, '--json'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    report, again = map(json.loads, done.stdout.splitlines())
    assert report["verdict"] == "READY"
    assert again == report


def test_a_wrong_word_is_refused_as_on_the_command_line():
    with pytest.raises(ConfigError, match="methd: unknown key; did you mean method"):
        orchestrator.compress("tiny", methd="slicegpt")


@pytest.mark.slow
def test_help_imports_neither_torch_nor_ray():
    program = (
        "import sys; from orchestrator import compress; from orchestrator.cli.main import cli; "
        "assert not {'torch', 'ray', 'transformers', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_schema_takes_what_we_write_and_refuses_what_we_refuse(capsys):
    main(["schema"])
    schema = json.loads(capsys.readouterr().out)
    good = yaml.safe_load("{model: tiny, slice: 0.25, calibration: {sequences: 8}}")
    jsonschema.validate(good, schema)
    for wrong in ({"methd": "x"}, {"slice": 2}, {"calibration": {"sequences": 0}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
