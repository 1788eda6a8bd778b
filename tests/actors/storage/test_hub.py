"""The Hub, as a small server on loopback that speaks what the client asks for."""

import hashlib
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from actors.storage.sources import embedded_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/small"
ASK = """
import json, sys
from actors.storage.sources import resolve_model
from planners.errors import CompressionError
try:
    found = resolve_model(sys.argv[1])
    print(json.dumps({"uri": found.uri, "revision": found.revision_hint}))
except CompressionError as error:
    print(json.dumps({"error": type(error).__name__, "said": str(error), "hint": error.hint}))
"""


class Hub:
    """Files of one repository; ``cut`` ends the first answers with a file early."""

    def __init__(self, files):
        self.files, self.requests = files, []
        self.gated, self.cut, self.spoiled = False, 0, ""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub._answer(self, body=True)

            def do_HEAD(self):
                hub._answer(self, body=False)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, asked, *, body):
        path = unquote(urlsplit(asked.path).path)
        self.requests.append((asked.command, path, asked.headers.get("Range", "")))
        if f"/{REPO}" not in path:
            self._send(asked, 404, {"X-Error-Code": "RepoNotFound"}, b"{}", body=body)
        elif path.startswith("/api/") and "/tree/" in path:
            self._send(asked, 200, {}, json.dumps(self._tree()).encode(), body=body)
        elif path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}
            self._send(asked, 200, {}, json.dumps(info).encode(), body=body)
        elif self.gated:
            self._send(asked, 403, {"X-Error-Code": "GatedRepo"}, b"{}", body=body)
        else:
            self._send_file(asked, path.partition(f"/resolve/{COMMIT}/")[2], body=body)

    def _tree(self):
        return [
            {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
            for n, d in self.files.items()
        ]

    def _send_file(self, asked, name, *, body):
        data = self.files[name]
        large = name.endswith(".safetensors")
        etag = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if name == self.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(asked.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        status = 206 if "Range" in asked.headers else 200
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = large and body and self.cut > 0
        self.cut -= bool(cut)
        self._send(asked, status, headers, data[start:], body=body, cut=cut)

    def _send(self, asked, status, headers, data, *, body, cut=False):
        asked.send_response(status)
        for key, value in headers.items():
            asked.send_header(key, value)
        asked.send_header("Content-Length", str(len(data)))
        asked.end_headers()
        if body:
            asked.wfile.write(data[: len(data) // 2] if cut else data)
            asked.wfile.flush()
        asked.close_connection = asked.close_connection or cut


@pytest.fixture
def hub():
    folder = embedded_model()
    names = [p.name for p in folder.iterdir() if p.suffix == ".json" or p.stem == "model"]
    files = {name: (folder / name).read_bytes() for name in names}
    server = Hub({**files, "pytorch_model.bin": b"pickle", "consolidated.safetensors": b"copy"})
    yield server
    server.close()


@pytest.fixture
def ask(hub, tmp_path):
    """Return a function that resolves a name in a process of its own, with an empty cache."""

    def call(name, url=None):
        environment = {
            **os.environ,
            "HF_ENDPOINT": url or hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-c", ASK, name], env=environment, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return call


def downloaded(hub):
    return {p.rpartition("/")[2] for m, p, _ in hub.requests if m == "GET" and "/resolve/" in p}


def test_only_what_is_needed_is_downloaded_and_once(hub, ask):
    found = ask(REPO)
    assert found["revision"] == COMMIT
    wanted = {name for name in hub.files if not name.startswith(("pytorch", "consolidated"))}
    assert downloaded(hub) == wanted
    for name in wanted:
        assert (Path(found["uri"]) / name).read_bytes() == hub.files[name]
    hub.requests.clear()
    assert ask(REPO) == found
    assert downloaded(hub) == set()


def test_a_copy_that_was_downloaded_serves_without_a_network(ask):
    found = ask(REPO)
    assert ask(REPO, url="http://127.0.0.1:9") == found


def test_a_download_that_ends_early_goes_on_where_it_stopped(hub, ask):
    (name,) = [name for name in hub.files if name.startswith("model.")]
    hub.files[name] = random.Random(0).randbytes(24_000_000)  # the client keeps 10 MB at a time
    hub.cut = 1
    found = ask(REPO)
    if "error" in found:
        assert "cannot be downloaded" in found["said"]
        found = ask(REPO)
    assert (Path(found["uri"]) / name).read_bytes() == hub.files[name]
    ranges = [r for m, p, r in hub.requests if m == "GET" and p.endswith(name)]
    assert len(ranges) == 2
    assert ranges[1].startswith("bytes=1"), "not from the beginning"


def test_bytes_that_are_not_those_the_hub_states_are_refused_and_fetched_anew(hub, ask):
    (name,) = [name for name in hub.files if name.startswith("model.")]
    hub.spoiled = name
    found = ask(REPO)
    assert found["error"] == "ModelError"
    assert f"{name} does not match the hash" in found["said"]
    hub.spoiled = ""
    assert ask(REPO)["revision"] == COMMIT


def test_a_gated_model_says_where_to_ask(hub, ask):
    hub.gated = True
    found = ask(REPO)
    assert found["error"] == "ModelError"
    assert "access is restricted" in found["said"]
    assert f"{REPO}" in found["hint"]


@pytest.mark.parametrize(
    ("name", "url", "words"),
    [("someone/nothing", None, "neither a local directory nor a repository"),
     (REPO, "http://127.0.0.1:9", "cannot be downloaded from the Hub")],
)  # fmt: skip
def test_what_is_not_there_or_not_reached_is_told_apart(ask, name, url, words):
    assert words in ask(name, url)["said"]
