"""A user goes through the pages from top to bottom, and types everything that stands there.

He is in a clone. The model and the texts that he brings are here, small; names of models that are
far away stand for small ones; S3 is a server on loopback, and the cluster one of this machine. Each
command finds what those before it have left, so a page that leaves a step out fails here.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bad_input.warm import command_line
from tests.builders import save_model
from tests.live import live_cluster
from tests.pages import ROOT, typed
from tests.stores import KEYS, new_bucket, uri_of

TINY = ROOT / "actors" / "models" / "tiny"
CLONED = ("Makefile", "README.md", "LICENSE", "pyproject.toml", "constraints.txt", "cluster.yaml",
          "benchmarks", "docs", "examples", "actors", "orchestrator", "planners")  # fmt: skip
# What is the user's own, or far away -> what stands for it on his desk. `plan` needs no weights.
STANDS_FOR = {
    "llama-2-70b": "./my-llama",
    "llama-2-7b": "./llama-7b",
    "llama-2-13b": "./llama-13b",
    "llama-3-8b": "./my-llama",
    "mistralai/Mistral-7B-v0.1": "./my-mistral",
    "DIR": "./my-llama",
    "RUN": "runs/demo",
}
_STANDS_FOR = re.compile(rf"(?<![\w./-])(?:{'|'.join(map(re.escape, STANDS_FOR))})(?![\w.-])")
# There is no GPU here; a worker on a cluster has one where it is not told otherwise. And a test
# with long sequences would only take longer.
OTHERWISE = {
    "--workers 8": "--workers 8 --device cpu",
    "workers: 8}": "workers: 8, device: cpu}",
    "--sequence-length 2048": "--sequence-length 256",
}
_ON_CLUSTER = re.compile(r"--address auto|submit|s3://|august.yaml")
_ON_S3 = re.compile(r"s3://((?:bucket|BUCKET)/\S+)")
# What is not executed -> why, and what is tried in its place, where parsing it says too little.
OF_A_CLOUD = ("it rents machines, or needs one that was rented", "")
OF_THE_TESTS = ("this test is a part of it", "")
NOT_EXECUTED = {
    "ray up cluster.yaml": OF_A_CLOUD,
    "python examples/aws_roles.py BUCKET": (
        "it makes roles in an account",
        "! python examples/aws_roles.py 2>said && grep 'aws_roles.py BUCKET' said",
    ),
    "ray down cluster.yaml": OF_A_CLOUD,
    "ray dashboard cluster.yaml": OF_A_CLOUD,
    "ray dashboard cluster.yaml &": OF_A_CLOUD,
    "make test": OF_THE_TESTS,
    "make check": OF_THE_TESTS,
    "make nightly": OF_THE_TESTS,
    ".venv/bin/pytest --hypothesis-profile nightly": (
        "this test is a part of it",
        f"cd {ROOT}/tests/planners && pytest --hypothesis-profile nightly --co -q test_spelling.py",
    ),
    "pip install -c constraints.txt .": (
        "it downloads torch and Ray",
        "pip install -c constraints.txt . --dry-run --no-deps --quiet",
    ),
    "compress-cluster watch-node": (
        "it waits for a notice as long as the machine lives",
        "compress-cluster watch-node --help",
    ),
    "compress-cluster reproduce FILE": (
        "it needs work that failed on two workers",
        "! compress-cluster reproduce FILE 2>said && grep 'FILE: there is no' said",
    ),
}
SAMPLE = (
    "compress-cluster plan ./my-llama",
    "compress-cluster plan llama-2-70b --cluster 8xA100-80GB --price 1.10",
    "compress-cluster recipes ls",
    "compress-cluster methods",
    "compress-cluster doctor",
    "compress-cluster cluster lint cluster.yaml",
    "compress-cluster doctor --out runs",
    "compress-cluster data lint train.jsonl --evaluation held-out.jsonl --model llama-2-7b",
    "make wheel",
    "ray get-auth-token --generate",
    "compress-cluster schema > recipe.schema.json",
    'eval "$(_COMPRESS_CLUSTER_COMPLETE=bash_source compress-cluster)"',
)
EVERYTHING = typed()
LIMIT_SECONDS = 1800  # of one command; a batch of 13 runs on a busy machine takes over 10 min


class Desk:
    """A clone with what a user brings, and how he types there."""

    def __init__(self, folder, environment, *, s3_port):
        self.folder, self.environment = folder, environment
        self.port, self.bucket = s3_port, new_bucket(s3_port)

    def do(self, each):
        """Do what is to be typed; fail where it does."""
        text = self.standing(each)
        if each.kind == "yaml":
            (self.folder / text.split()[1]).write_text(text)
            return
        words = shlex.split(text) if each.kind == "sh" else ["python", "-c", text]
        if words[0] == "compress-cluster" and ">" not in words:
            done = command_line(
                words[1:], folder=self.folder, environment=self.environment, seconds=LIMIT_SECONDS
            )
            assert done.exit_code == 0, f"{text}\n{done.stdout}\n{done.stderr}"
            assert done.stdout.strip()
            return
        self.shell(text if each.kind == "sh" else shlex.join(words))

    def shell(self, text):
        done = subprocess.run(
            ["bash", "-ec", text],
            cwd=self.folder, env={**os.environ, **self.environment},
            capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"

    def standing(self, each):
        """Return the text with what is here in the place of what is elsewhere."""
        if each.text.startswith("compress-cluster plan"):
            return each.text
        text = _STANDS_FOR.sub(lambda found: STANDS_FOR[found[0]], each.text)
        text = _ON_S3.sub(lambda found: uri_of(self.port, f"{self.bucket}/{found[1]}"), text)
        for there, here in OTHERWISE.items():
            text = text.replace(there, here)
        text = text.replace(".venv/bin/", f"{sys.prefix}/bin/")
        if "--point NAME" in text:
            text = text.replace("NAME", self.a_point(text.split()[2]))
        return text

    def a_point(self, run):
        found = json.loads((self.folder / run / "pareto.json").read_text())
        return found["points"][0]["name"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory, s3_port):
    folder = tmp_path_factory.mktemp("clone")
    for name in CLONED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    save_user_model(folder / "my-llama")
    save_user_model(folder / "llama-7b", seed=1)
    save_user_model(folder / "llama-13b", seed=2)
    save_user_model(folder / "my-mistral", model_type="mistral")
    write_texts(folder)
    installed = folder / ".installed"
    installed.touch()
    os.utime(installed, (time.time() + 60,) * 2)
    binaries = Path(sys.executable).parent
    environment = {
        **KEYS,
        "HF_ENDPOINT": "http://127.0.0.1:9",  # a Hub that is away is no error
        "HOME": str(folder),
        "MAKEFLAGS": f"BIN={binaries} INSTALLED={installed}",
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip's way to say that setuptools is here
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in KEYS.items():
            patch.setenv(name, value)
        return Desk(folder, environment, s3_port=s3_port)


@pytest.fixture(scope="module")
def cluster(desk):
    """Start the cluster that `auto` and `submit` find."""
    with live_cluster(desk.folder, num_cpus=8, **desk.environment) as found:
        desk.environment["RAY_ADDRESS"] = found.gcs_address
        desk.environment["RAY_API_SERVER_ADDRESS"] = found.url
        yield


def save_user_model(folder, **sizes):
    """Write a model with the vocabulary of `tiny`, most of it in its layers, as in large ones."""
    save_model(
        folder, vocab_size=512, num_hidden_layers=2, hidden_size=64, intermediate_size=192,
        max_position_embeddings=256, **sizes,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)


def write_texts(folder):
    """Write two texts of the interpreter's own library that share no file."""
    sources = sorted(Path(shutil.__file__).parent.glob("*.py"))
    for name, part in (("train", sources[::2]), ("held-out", sources[1::2])):
        lines = [json.dumps({"text": path.read_text(errors="replace")}) for path in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))


def test_what_is_not_executed_stands_on_a_page_and_has_its_reason():
    assert set(NOT_EXECUTED) <= {each.text for each in EVERYTHING}
    assert all(reason for reason, _ in NOT_EXECUTED.values())


@pytest.mark.slow
@pytest.mark.parametrize("text", [text for text, (_, tried) in NOT_EXECUTED.items() if tried])
def test_what_is_not_executed_is_tried_as_far_as_it_goes(text, desk):
    desk.shell(NOT_EXECUTED[text][1])


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("each", [e for e in EVERYTHING if e.text in SAMPLE], ids=str)
def test_a_sample_of_what_the_pages_say_works(each, desk):
    desk.do(each)


@pytest.mark.ray
@pytest.mark.nightly
@pytest.mark.parametrize("each", [e for e in EVERYTHING if e.text not in NOT_EXECUTED], ids=str)
def test_everything_on_the_pages_works_in_its_order(each, desk, request):
    if _ON_CLUSTER.search(each.text):
        request.getfixturevalue("cluster")
    desk.do(each)
