"""Where pictures and videos come from: paths, file:// URLs, data: URIs, bytes and, where allowed, http(s) URLs."""

import base64
import binascii
import http.client
import io
import os
import socket
import ssl
import stat
import threading
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from ..artifacts.errors import RequestError

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class HttpLimits:
    """What may be fetched over http(s). Allow it only for requests that you trust: they name hosts of your network."""

    allowed: bool = False
    max_bytes: int = 256 << 20
    timeout_s: float = 60.0


LOCAL_ONLY = HttpLimits()


def describe(source: object, kind: str) -> str:
    """How an error names a source: its location, or what kind of thing was given."""
    if isinstance(source, str) and source.startswith("data:"):
        return "data: URI"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source) or f"{kind} path ''"
    if isinstance(source, bytes):
        return f"{kind} of {len(source)} bytes"
    if hasattr(source, "dtype") and hasattr(source, "shape"):
        return f"array {source.dtype}{list(source.shape)}"
    return type(source).__name__


def readable(name: str, source: str | bytes | os.PathLike[str], http: HttpLimits) -> str | io.BytesIO:
    """A path to a regular file, or the bytes themselves. Raises RequestError that starts with `name`."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    location = os.fspath(source)
    scheme = location.partition(":")[0].lower()
    if scheme in ("http", "https"):
        if not http.allowed:
            raise RequestError(
                f"{name}: nothing is fetched from the network unless it is allowed (--allow-http, HttpLimits); "
                "download it and give its path"
            )
        return io.BytesIO(_fetch(name, location, http))
    if scheme == "data":
        try:
            return io.BytesIO(base64.b64decode(location.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise RequestError(f"{name}: not valid base64: {error}") from error
    if scheme == "file":
        url = urlsplit(location)
        if url.netloc not in ("", "localhost"):
            raise RequestError(f"{name}: names the host {url.netloc!r}; write file:///absolute/path")
        location = unquote(url.path)
    try:
        mode = os.stat(location).st_mode
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    # a pipe would block and a folder fails with a riddle
    if not stat.S_ISREG(mode):
        raise RequestError(f"{name}: not a file")
    return location


def _fetch(name: str, url: str, limits: HttpLimits) -> bytes:
    """The body of a URL. A timer ends it: socket timeouts alone let a server send one byte at a time, forever."""
    sockets: list[socket.socket] = []

    def expire() -> None:
        expired.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    expired, timer = threading.Event(), threading.Timer(limits.timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        with _opener(sockets).open(url, timeout=limits.timeout_s) as response:
            body = bytearray()
            while chunk := response.read(min(_CHUNK_BYTES, limits.max_bytes + 1 - len(body))):
                body += chunk
                if len(body) > limits.max_bytes:
                    raise RequestError(f"{name}: larger than {limits.max_bytes} bytes")
            expected = response.headers.get("Content-Length")
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set():
            raise RequestError(f"{name}: did not arrive within {limits.timeout_s:g} s") from error
        raise RequestError(f"{name}: cannot be fetched: {error}") from error
    finally:
        timer.cancel()
    if expired.is_set():
        raise RequestError(f"{name}: did not arrive within {limits.timeout_s:g} s")
    if expected is not None and expected.isdecimal() and len(body) < int(expected):
        raise RequestError(f"{name}: the connection ended after {len(body)} of {expected} bytes")
    return bytes(body)


def _opener(sockets: list[socket.socket]) -> urllib.request.OpenerDirector:
    """http and https, proxies and redirects between those: urllib's own opener also reads ftp:, file: and data:."""

    class Http(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Https(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class HttpHandler(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Http, req)

    class HttpsHandler(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Https, req, context=ssl.create_default_context())

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        HttpHandler(),
        HttpsHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
