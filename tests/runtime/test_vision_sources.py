"""http(s) sources: fetched only where allowed, within limits of size and time, from http(s) alone."""

import io
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.images import load_image
from qwen2vl_tc.runtime.sources import LOCAL_ONLY, HttpLimits, readable

ALLOWED = HttpLimits(allowed=True, max_bytes=100_000, timeout_s=20)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    stop = threading.Event()
    sent_mib = 0

    def do_GET(self) -> None:
        body = png()
        if self.path in ("/moved", "/moved-at-length"):
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
            try:
                # more than the sockets' buffers hold
                for _ in range(100 if self.path == "/moved-at-length" else 0):
                    self.wfile.write(bytes(1 << 20))
                    Handler.sent_mib += 1
            except OSError:
                return
        elif self.path == "/digits":
            self.send_response(200)
            self.send_header("Content-Length", "9" * 5000)
            self.end_headers()
        elif self.path in ("/to-file", "/to-ftp", "/loop"):
            self.send_response(302)
            target = {"/to-file": "file:///etc/hostname", "/to-ftp": "ftp://127.0.0.1/a.png", "/loop": "/loop"}
            self.send_header("Location", target[self.path])
            self.end_headers()
        elif self.path == "/drip":
            self.send_response(200)
            self.end_headers()
            while not self.stop.wait(0.05):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        elif self.path in ("/large", "/endless"):
            self.send_response(200)
            if self.path == "/large":
                self.send_header("Content-Length", "10000000")
            self.end_headers()
            try:
                while not self.stop.is_set():
                    self.wfile.write(bytes(10_000))
            except OSError:
                return
        elif self.path in ("/a.png", "/short"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) * (2 if self.path == "/short" else 1)))
            self.end_headers()
            self.wfile.write(body)
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        Handler.stop.set()
        running.shutdown()


@pytest.mark.parametrize("path", ["/a.png", "/moved", "/moved-at-length"])
def test_an_allowed_url_is_the_picture_behind_it(server: str, path: str) -> None:
    expected = np.asarray(load_image(png()))
    np.testing.assert_array_equal(np.asarray(load_image(server + path, ALLOWED)), expected)
    assert Handler.sent_mib < 100, "what comes with a redirect is not read"


def test_nothing_is_fetched_unless_it_is_allowed(server: str) -> None:
    with pytest.raises(RequestError, match="--allow-http"):
        load_image(server + "/a.png")
    with pytest.raises(RequestError, match="--allow-http"):
        readable("x", "HTTPS://127.0.0.1/a.png", LOCAL_ONLY)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/absent", "404"),
        ("/large", "larger than 100000 bytes"),
        ("/endless", "larger than 100000 bytes"),
        ("/short", "ended after"),
        ("/digits", "cannot be fetched"),
        ("/to-file", "cannot be fetched"),
        ("/to-ftp", "cannot be fetched"),
        ("/loop", "cannot be fetched"),
    ],
)
def test_what_does_not_arrive_whole_is_refused_by_name(server: str, path: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"{path}: .*{said}"):
        load_image(server + path, ALLOWED)


def test_a_server_that_sends_byte_by_byte_cannot_hold_a_request(server: str) -> None:
    with pytest.raises(RequestError, match=r"did not arrive within 0\.5 s"):
        load_image(server + "/drip", HttpLimits(allowed=True, timeout_s=0.5))


def test_a_connection_made_too_late_is_not_read(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def slow(*given: Any, **named: Any) -> Any:
        for timer in threading.enumerate():
            if isinstance(timer, threading.Timer):
                timer.join()
        return look_up(*given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(RequestError, match=r"did not arrive within 0\.1 s"):
        # read on, it would be refused for its size
        load_image(server + "/drip", HttpLimits(allowed=True, max_bytes=3, timeout_s=0.1))


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/a.png", "http://", "http://[::1", "https://127.0.0.1:1/"])
def test_a_server_that_is_not_there_is_named(url: str) -> None:
    with pytest.raises(RequestError, match="cannot be fetched"):
        load_image(url, ALLOWED)
