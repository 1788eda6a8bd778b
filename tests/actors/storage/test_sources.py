"""Where a model comes from: what is found, what is downloaded, and what is refused."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from actors.storage.sources import ALIASES, embedded_model, resolve_model
from planners.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle",
    "tokenizer.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs, for a few repositories."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        if path.startswith("api/models/org/"):
            self.describe(path.split("/")[3], path)
        elif path.startswith("org/gated/"):
            self.answer(403, error="GatedRepo")
        else:
            self.answer(200, FILES[path.rpartition("/")[2]])

    def describe(self, repository, path):
        revision = path.partition("/revision/")[2] or "main"
        if repository == "missing":
            self.answer(404, error="RepoNotFound")
        elif repository == "down":
            self.answer(500)
        elif revision not in ("main", "v1", COMMIT):
            self.answer(404, error="RevisionNotFound")
        elif "/tree/" in path:
            names = ["pytorch_model.bin"] if repository == "pickled" else FILES
            tree = [
                {"type": "file", "path": name, "size": len(FILES[name]), "oid": name}
                for name in names
            ]
            self.answer(200, json.dumps(tree).encode())
        else:
            about = {"id": f"org/{repository}", "sha": COMMIT, "siblings": []}
            self.answer(200, json.dumps(about).encode())

    def answer(self, status, body=b"", *, error=""):
        self.send_response(status)
        for name, value in {
            "Content-Length": len(body),
            "ETag": f'"{len(body)}-{status}-{self.path[-20:]}"',
            "X-Repo-Commit": COMMIT,
            "X-Error-Code": error,
        }.items():
            if value != "":
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads, and no token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache, monkeypatch):
    """A Hub on this machine; returns a function that makes it unreachable."""
    assert not cache.exists()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def close():
        close_session()
        server.shutdown()
        server.server_close()
        thread.join()

    yield close
    close()


@pytest.fixture
def model(tmp_path):
    """A directory with a config.json."""
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    return path


def refusal(name):
    """Return message and hint of the refusal of a model."""
    with pytest.raises(ModelError) as caught:
        resolve_model(str(name))
    return f"{caught.value}; {caught.value.hint}"


def test_a_directory_is_found_by_its_path(model, monkeypatch):
    found = resolve_model(str(model))
    assert (found.name, found.uri, found.revision_hint) == ("my-model", str(model), "")
    monkeypatch.chdir(model.parent)
    monkeypatch.setenv("HOME", str(model.parent))
    for name in ("my-model", "./my-model", "./my-model/", "../" + model.parent.name + "/my-model"):
        assert resolve_model(name) == found
    assert resolve_model("~/my-model") == found


def test_the_name_of_a_directory_is_absolute_for_workers_that_run_elsewhere(model, monkeypatch):
    monkeypatch.chdir(model)
    assert resolve_model(".").uri == str(model)


def test_tiny_comes_with_the_package():
    found = resolve_model("tiny")
    assert (found.name, found.uri) == ("tiny", str(embedded_model()))
    assert (embedded_model() / "tokenizer.json").is_file()


def test_an_alias_is_not_hidden_by_a_directory_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny").uri == str(embedded_model())
    assert resolve_model("./tiny").uri == str(tmp_path / "tiny")


@pytest.mark.parametrize("uri", ["s3://bucket/models/llama", "gs://bucket/llama/"])
def test_an_object_store_uri_is_returned_as_it_is(uri):
    found = resolve_model(uri)
    assert (found.name, found.uri) == ("llama", uri)


def test_other_addresses_are_refused_with_the_possible_ones():
    message = refusal("https://huggingface.co/org/model")
    assert "s3:// or gs://" in message
    assert "org/name" in message


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing/model", "../a/b"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert f"model {name!r}: no such directory" in refusal(name)


@pytest.mark.parametrize("name", ["nobody", "a/b/c", "", "two words", "x" * 300])
def test_a_name_that_is_nothing_is_refused_with_the_aliases(name):
    message = refusal(name)
    assert name in message
    assert all(alias in message for alias in ALIASES)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tinny", "tiny"), ("Llama-2-7B", "llama-2-7b"), ("llama3-8b", "llama-3-8b")],
)
def test_a_misspelt_alias_is_refused_with_the_nearest(name, nearest):
    assert f"did you mean {nearest}?" in refusal(name)


def test_the_home_of_nobody_is_refused():
    assert "model '~nobody-here/x': " in refusal("~nobody-here/x")


def test_a_file_is_refused(model):
    assert "is a file" in refusal(model / "config.json")


def test_a_directory_without_config_is_refused(tmp_path):
    assert "the directory has no config.json" in refusal(tmp_path)


def test_a_run_directory_is_refused_with_the_model_in_it(model):
    run = model.parent / "run"
    run.mkdir()
    model.rename(run / "model")
    assert f"did you mean {run / 'model'}?" in refusal(run)


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-70b@main", "org/model"])
def test_offline_is_refused_at_once_with_the_way_out(cache, monkeypatch, name):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    started = time.monotonic()
    message = refusal(name)
    assert time.monotonic() - started < 5
    assert "offline mode is enabled" in message
    assert "give the path of its directory" in message
    assert not cache.exists()


def test_unreachable_hub_is_refused_soon_with_the_way_out(hub):
    hub()
    started = time.monotonic()
    message = refusal("org/model")
    assert time.monotonic() - started < 10
    assert "cannot be downloaded from the Hub" in message
    assert "give the path of its directory" in message


@pytest.mark.usefixtures("hub")
def test_a_download_has_the_files_that_are_read_and_the_commit(cache):
    found = resolve_model("org/model")
    assert (found.name, found.revision_hint) == ("model", COMMIT)
    assert found.uri.startswith(str(cache))
    names = {path.name for path in (cache / found.uri).iterdir()}
    assert names == FILES.keys() - {"pytorch_model.bin"}


@pytest.mark.parametrize("revision", ["v1", COMMIT])
@pytest.mark.usefixtures("hub")
def test_a_revision_is_resolved_to_its_commit(revision):
    found = resolve_model(f"org/model@{revision}")
    assert (found.name, found.revision_hint) == ("model", COMMIT)


def test_a_download_is_used_again_without_a_network(hub, monkeypatch):
    found = [resolve_model("org/model"), resolve_model("org/model@v1")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [resolve_model("org/model"), resolve_model("org/model@v1")] == found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub()
    assert resolve_model("org/model") == found[0]


@pytest.mark.usefixtures("hub")
def test_half_a_download_is_not_taken_for_a_model(monkeypatch):
    found = resolve_model("org/model")
    (Path(found.uri) / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is enabled" in refusal("org/model")


@pytest.mark.usefixtures("hub")
def test_a_gated_model_is_refused_with_how_to_get_access():
    message = refusal("org/gated")
    assert "https://huggingface.co/org/gated" in message
    assert "hf auth login" in message
    assert "HF_TOKEN" in message


@pytest.mark.usefixtures("hub")
def test_a_repository_that_does_not_exist_is_refused():
    message = refusal("org/missing")
    assert "neither a local directory nor a repository on the Hub" in message


@pytest.mark.usefixtures("hub")
def test_a_revision_that_does_not_exist_is_refused_by_name():
    assert "model org/model: has no revision 'v9'" in refusal("org/model@v9")


@pytest.mark.usefixtures("hub")
def test_a_hub_that_fails_is_refused_with_what_it_said():
    assert "500" in refusal("org/down")


@pytest.mark.usefixtures("hub")
def test_a_repository_of_pickles_is_refused_and_not_downloaded(cache):
    assert "no config.json with .safetensors weights" in refusal("org/pickled")
    assert not list(cache.rglob("*.bin"))
