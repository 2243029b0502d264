"""An S3 server on loopback (moto's) and a proxy in front of it that fails as networks and servers do."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import struct
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastsrgan.store.files import Keys

HOST = "127.0.0.1"
BUCKET = "bucket"
FAULTS = ("500", "503", "reset", "cut", "stall", "slow")  # and "403", "answer lost"
# Long enough for an honest answer on a busy machine; tests of `stall` and `slow` set shorter ones.
QUICK = {"FASTSRGAN_STORE_RETRIES": "3", "FASTSRGAN_STORE_TIMEOUT": "5", "FASTSRGAN_STORE_BACKOFF": "0.01"}


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The address of an S3 server without any bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def environment(endpoint: str) -> dict[str, str]:
    """Variables with which every S3 client in this process or another goes to ``endpoint``."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        **QUICK,
    }


@contextlib.contextmanager
def running() -> Iterator[FaultProxy]:
    """An S3 server with BUCKET behind a proxy; every S3 client goes there until the end."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        proxy = FaultProxy(server)
        for name, value in environment(proxy.url).items():
            patch.setenv(name, value)
        # The server looks at the form of the signature only.
        request = urllib.request.Request(f"{server}/{BUCKET}", method="PUT")
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request")
        urllib.request.urlopen(request, timeout=60).close()
        try:
            yield proxy
        finally:
            proxy.close()


def objects(place: str | os.PathLike) -> dict[str, bytes | None]:
    """Everything below a URL or in a folder."""
    keys = Keys(place, read_only=True)
    found = sorted(keys.sizes(""))
    return dict(zip(found, keys.get_all(found), strict=True))


class FaultProxy:
    """Forwards to ``target``. The next ``count`` requests that ``which`` picks fail in the given way.

    ``requests`` lists (method, path, outcome) of all that came.
    """

    def __init__(self, target: str) -> None:
        self.target = urllib.parse.urlsplit(target).netloc
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()
        self.fine()
        proxy = self

        class Handler(_Handler):
            pass

        Handler.proxy = proxy
        self.server = _Server((HOST, 0), Handler)
        self.url = f"http://{HOST}:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def fail(self, fault: str, count: float = 1, which: Callable[[str, str], bool] = lambda method, path: True) -> None:
        """From now on fail ``count`` times, in the requests for which ``which(method, path)`` is true."""
        with self.lock:
            self.fault, self.count, self.which = fault, count, which
            self.requests.clear()

    def fine(self) -> None:
        """Forward everything."""
        with self.lock:
            self.fault, self.count, self.which = "", 0.0, lambda method, path: False

    def outcome(self, method: str, path: str) -> str:
        """The fault that a request is to meet, "" for none."""
        with self.lock:
            met = self.fault if self.count > 0 and self.which(method, path) else ""
            self.count -= bool(met)
            self.requests.append((method, path, met))
            return met

    def close(self) -> None:
        """Stop; requests that stall are dropped."""
        self.server.stopped.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.stopped = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy
    server: _Server

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        fault = self.proxy.outcome(self.command, path)
        if fault == "answer lost":
            self._forward(body)
        if fault in ("403", "500", "503"):
            self._reply(int(fault), {"Content-Type": "application/xml"}, b"")
        elif fault in ("reset", "answer lost"):
            # Closed with data unread and no lingering: the kernel sends a reset instead of an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif fault == "stall":
            self.close_connection = True
            self.server.stopped.wait(60)
        else:
            self._reply(*self._forward(body), fault)

    def setup(self) -> None:
        super().setup()
        self.behind = http.client.HTTPConnection(self.proxy.target, timeout=60)

    def finish(self) -> None:
        self.behind.close()
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        self.behind.request(self.command, self.path, body, dict(self.headers))
        answer = self.behind.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()

    def _reply(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        headers = {k: v for k, v in headers.items() if k.lower() not in ("connection", "transfer-encoding")}
        if self.command != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "content-length"}
            headers["Content-Length"] = str(len(body))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "cut":
            self.close_connection = True
            self.wfile.write(body[: len(body) // 2])
        elif fault == "slow":  # a byte now and then: never silent for long, never done
            self.close_connection = True
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                if self.server.stopped.wait(0.02):
                    break
        else:
            self.wfile.write(body)
