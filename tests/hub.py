"""A Hub on loopback: lists a model, asks for a token, and sends its clients to a CDN for the files.

As the real one: the list of a gated model's files is everybody's and its files are not; what comes
from the CDN needs no token, and a request that brings one along is refused there.
"""

import contextlib
import hashlib
import io
import json
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants

from actors.storage import hub as actors_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/large"
SIGNATURE = "signed-for-a-minute"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A range of a file that somebody got."""

    client: str
    name: str
    start: int
    size: int


@dataclass
class FakeHub:
    """Both servers, and what they were asked for; a context manager.

    Attributes:
        folder: holds the files.
        token: that a client must have; none where it is empty.
        host: to listen on.
        log: a file that gets a line for each range, or nothing.
        failures: status codes that the next requests to the CDN get instead.
        limits: how many of the next requests to the Hub are told to come again in a second.
        newest: the commit that main is.
        wikitext: split -> the parquet file of WikiText-2.
    """

    folder: Path
    token: str = ""
    host: str = "127.0.0.1"
    log: Path | None = None
    served: list[Served] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    limits: int = 0
    newest: str = COMMIT
    wikitext: dict[str, bytes] = field(default_factory=dict)

    def __enter__(self):
        self.files = {
            p.relative_to(self.folder).as_posix(): p.read_bytes()
            for p in self.folder.rglob("*")
            if p.is_file()
        }
        self._servers = [self._started(self._hub), self._started(self._cdn)]
        self.url, self._cdn_url = [f"http://{self.host}:{s.server_port}" for s in self._servers]
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def _started(self, answer):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                with contextlib.suppress(ConnectionError):
                    answer(self)

            do_HEAD = do_GET  # noqa: N815 its name

        server = ThreadingHTTPServer((self.host, 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    def _hub(self, asked):
        parts = urlsplit(unquote(asked.path))
        self.asked.append(parts.path)
        if self.limits:
            self.limits -= 1
            return _send(asked, 429, {"RateLimit": '"resolvers";r=0;t=0'})
        if parts.path.startswith("/datasets/Salesforce/wikitext/resolve/main/wikitext-2-raw-v1/"):
            data = self.wikitext[parts.path.rpartition("/")[2].partition("-")[0]]
            etag = hashlib.sha256(data).hexdigest()
            return _send(asked, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, data)
        if f"/{REPO}" not in parts.path:
            return _send(asked, 404, {"X-Error-Code": "RepoNotFound"})
        if parts.path.startswith("/api/"):
            revision = parts.path.partition("/revision/")[2] or "main"
            if revision not in ("main", self.newest, COMMIT):
                return _send(asked, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [_sibling(name, data) for name, data in self.files.items()]
            sha = self.newest if revision == "main" else revision
            return _send(asked, 200, data=json.dumps({"id": REPO, "sha": sha,
                                                      "siblings": siblings}).encode())  # fmt: skip
        if self.token and asked.headers.get("Authorization") != f"Bearer {self.token}":
            known = "Authorization" in asked.headers
            return _send(asked, 403 if known else 401, {"X-Error-Code": "GatedRepo"})
        commit, _, name = parts.path.partition("/resolve/")[2].partition("/")
        if name not in self.files or commit not in (COMMIT, self.newest):
            return _send(asked, 404, {"X-Error-Code": "EntryNotFound"})
        return _send(asked, 302, {"Location": f"{self._cdn_url}/{name}?{SIGNATURE}=1"})

    def _cdn(self, asked):
        parts = urlsplit(unquote(asked.path))
        if "Authorization" in asked.headers or SIGNATURE not in parse_qs(parts.query):
            return _send(asked, 400)
        if self.failures:
            return _send(asked, self.failures.pop(0))
        name = parts.path.lstrip("/")
        data = self.files[name]
        first, _, last = asked.headers.get("Range", "bytes=0-").partition("=")[2].partition("-")
        start, end = int(first), int(last or len(data) - 1) + 1
        found = Served(client=asked.client_address[0], name=name, start=start, size=end - start)
        self.served.append(found)
        if self.log:
            with self.log.open("a") as file:
                file.write(json.dumps(vars(found)) + "\n")
        where = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
        return _send(asked, 206 if "Range" in asked.headers else 200, where, data[start:end])


def used_in_process(hub, monkeypatch, home):
    """Have this process take a fake Hub for the Hub, with an empty cache and no token."""
    url = hub.url
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    forget()


def forget():
    """Have this process know nothing of the Hub any more: no token, no list, no header."""
    actors_hub.lend("")
    actors_hub._files.cache_clear()
    actors_hub._small.cache_clear()


def wikitext_file(rows):
    """Return rows of text as the bytes of a parquet file."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), sink)
    return sink.getvalue()


def _sibling(name, data):
    found = {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if name.endswith(".safetensors"):
        digest = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 135}
    return found


def _send(asked, status, headers=(), data=b""):
    asked.send_response(status)
    for key, value in dict(headers).items():
        asked.send_header(key, value)
    asked.send_header("Content-Length", str(len(data)))
    asked.end_headers()
    if asked.command != "HEAD":
        asked.wfile.write(data)


if __name__ == "__main__":
    folder, token, host, log = sys.argv[1:]
    with FakeHub(Path(folder), token=token, host=host, log=Path(log)) as hub:
        print(hub.url, flush=True)
        sys.stdin.read()
