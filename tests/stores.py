"""A real server that speaks S3 on loopback, and a proxy before it that fails by schedule."""

import contextlib
import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

from pyarrow import fs

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAPLANTED0000000", "AWS_SECRET_ACCESS_KEY": "planted/s3+secret"}
# A process of its own: the client may hold this one's lock while it waits for an answer.
_SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address=sys.argv[1], port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1") -> Iterator[int]:
    """Start moto's server for the length of a block; give its port."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER, host],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        try:
            yield int(server.stdout.readline())
        finally:
            server.kill()


def new_bucket(port: int, host: str = "127.0.0.1") -> str:
    """Make a bucket and return its name."""
    name = f"bucket-{uuid4().hex[:12]}"
    store = fs.S3FileSystem(
        endpoint_override=f"{host}:{port}",
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    store.create_dir(name)
    return name


def uri_of(port: int, path: str, host: str = "127.0.0.1") -> str:
    """Return the URI of something in a bucket of the server at a port."""
    query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
    return f"s3://{path}?{query}"


@dataclass
class Fault:
    """What happens to some requests.

    Attributes:
        kind: ``status`` answers with a code and an S3 error; ``reset`` breaks the connection;
            ``cut`` ends a body early; ``short`` gives half a body and says that it is all;
            ``slow`` waits first.
        method: of the requests.
        path: what their path or query must hold.
        times: how many of them.
        after: how many pass before.
        code: of ``status``.
        error: of ``status``, the S3 code.
        seconds: of ``slow``.
    """

    kind: str
    method: str = "GET"
    path: str = ""
    times: int = 10**9
    after: int = 0
    code: int = 500
    error: str = "InternalError"
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    seen: int = 0

    def strikes(self, method: str, path: str) -> bool:
        """Return whether this request is one of those, counting it."""
        if method not in self.method.split() or self.path not in path:
            return False
        self.seen += 1
        return self.after < self.seen <= self.after + self.times


class FaultyStore:
    """A proxy before an S3 server: passes requests on, but for those that a fault strikes."""

    def __init__(self, upstream: int) -> None:
        self.faults: list[Fault] = []
        self.bucket = ""
        self.requests: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def handle_request(self) -> None:
                store._handle(self, upstream)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815 its names

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def uri(self, path: str) -> str:
        """Return the URI of something in the bucket, through this proxy."""
        return uri_of(self.port, f"{self.bucket}/{path}")

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def count(self, method: str, path: str = "") -> int:
        """Return how many requests came."""
        return sum(m == method and path in p for m, p in self.requests)

    def _handle(self, asked: BaseHTTPRequestHandler, upstream: int) -> None:
        body = _body(asked)
        with self._lock:
            self.requests.append((asked.command, asked.path))
            fault = next((f for f in self.faults if f.strikes(asked.command, asked.path)), None)
        if fault is not None and fault.kind == "slow":
            time.sleep(fault.seconds)
        if fault is not None and fault.kind == "reset":
            _reset(asked.connection)
            asked.close_connection = True
            return
        if fault is not None and fault.kind == "status":
            xml = f"<Error><Code>{fault.error}</Code><Message>no</Message></Error>".encode()
            data = b"" if asked.command == "HEAD" else xml
            _answer(asked, fault.code, fault.headers, data)
            return
        connection = http.client.HTTPConnection("127.0.0.1", upstream, timeout=60)
        dropped = ("transfer-encoding", "content-length", "connection", "expect")
        headers = {k: v for k, v in asked.headers.items() if k.lower() not in dropped}
        connection.request(asked.command, asked.path, body=body, headers=headers)
        answer = connection.getresponse()
        data = answer.read()
        headers = {
            k: v for k, v in answer.getheaders() if k.lower() not in (*dropped, "date", "server")
        }
        length = answer.getheader("Content-Length") if asked.command == "HEAD" else None
        connection.close()
        kind = fault.kind if fault is not None else ""
        _answer(asked, answer.status, headers, data, kind=kind, length=length)


def _body(asked: BaseHTTPRequestHandler) -> bytes:
    if asked.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return asked.rfile.read(int(asked.headers.get("Content-Length", 0)))
    data = b""
    while size := int(asked.rfile.readline().split(b";")[0], 16):
        data += asked.rfile.read(size)
        asked.rfile.readline()
    while asked.rfile.readline().strip():
        pass
    return data


def _answer(
    asked: BaseHTTPRequestHandler,
    status: int,
    headers: Any,
    data: bytes,
    *,
    kind: str = "",
    length: str | None = None,
) -> None:
    shown = data[: len(data) // 2] if kind in ("cut", "short") else data
    with contextlib.suppress(ConnectionError):
        asked.send_response(status)
        for name, value in headers.items():
            asked.send_header(name, value)
        said = len(shown) if kind == "short" else len(data)
        asked.send_header("Content-Length", length or str(said))
        asked.end_headers()
        asked.wfile.write(shown)
        asked.wfile.flush()
        if kind == "cut":
            asked.close_connection = True


def _reset(connection: socket.socket) -> None:
    """Close so that the other side sees a reset, not an end."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
