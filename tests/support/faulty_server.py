"""An HTTP server with the objects and the faults that a test gives it; S3's GetObject is such a request.

Paths are `/bucket/key`; signatures are not checked. It takes Range and keeps connections alive, as storage does.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote

S3_CODES = {403: "AccessDenied", 404: "NoSuchKey", 429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}


@dataclass
class StorageFault:
    """The answer that the next `times` requests for an object get instead of it."""

    kind: Literal["status", "delay", "stall", "cut", "reset", "short", "flip", "whole"]
    status: int = 503
    delay_s: float = 0.0
    times: float = float("inf")


@dataclass
class FaultyServer:
    """A server, as a context manager.

    Attributes:
        objects: The content of each path; may change while it serves.
        faults: The fault of each path; may change while it serves.
        requests: The paths that were requested.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, StorageFault] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def __enter__(self) -> FaultyServer:
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"store": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def take_fault(self, path: str) -> StorageFault | None:
        """Note the request, and return its fault if it has one."""
        with self.lock:
            self.requests.append(path)
            fault = self.faults.get(path)
            if fault is None or fault.times <= 0:
                return None
            fault.times -= 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: FaultyServer

    def do_HEAD(self) -> None:
        content = self.store.objects.get(unquote(self.path.split("?")[0]))
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        fault = self.store.take_fault(path)
        kind = fault.kind if fault else None
        if fault and kind == "status":
            return self._refuse(fault.status)
        if fault and kind == "delay":
            time.sleep(fault.delay_s)
        if kind == "reset":
            return self._reset()
        content = self.store.objects.get(path)
        if content is None:
            return self._refuse(404)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or kind == "whole":
            return self._answer(200, content, kind)
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        if start >= len(content):
            return self._refuse(416)
        return self._answer(206, content[start:stop], kind, f"bytes {start}-{stop - 1}/{len(content)}")

    def _answer(self, status: int, body: bytes, kind: str | None, content_range: str | None = None) -> None:
        half = len(body) // 2
        if kind == "flip":
            body = body[:half] + bytes([body[half] ^ 16]) + body[half + 1 :]
        if kind == "short":
            body = body[:half]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if kind not in ("stall", "cut"):
            self.wfile.write(body)
            return
        self.wfile.write(body[:half])
        self.wfile.flush()
        if kind == "stall":
            self.store.stopping.wait()
        self.close_connection = True

    def _refuse(self, status: int) -> None:
        body = f"<Error><Code>{S3_CODES.get(status, 'Other')}</Code><Message>refused</Message></Error>".encode()
        self._answer(status, body, None)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def handle(self) -> None:
        with suppress(OSError):  # the client closed the connection, or the server did
            super().handle()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass
