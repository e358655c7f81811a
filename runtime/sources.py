"""Where pictures and videos come from: paths, file:// URLs, data: URIs, bytes and, where allowed, http(s) URLs."""

import base64
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
_NAME_CHARACTERS = 200


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
        location = str(os.fspath(source)) or f"{kind} path ''"
        return location if len(location) <= _NAME_CHARACTERS else location[:_NAME_CHARACTERS] + "..."
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
        except ValueError as error:
            raise RequestError(f"{name}: not valid base64: {error}") from error
    if scheme == "file":
        try:
            url = urlsplit(location)
        except ValueError as error:
            raise RequestError(f"{name}: not a file:// URL: {error}") from error
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
    """The body of a URL. A timer ends it: socket timeouts alone let a server send one byte at a time, forever.

    Looking up a name cannot be ended; nothing is sent to what it finds too late.
    """
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
        with _opener(sockets, expired).open(url, timeout=limits.timeout_s) as response:
            body = bytearray()
            while chunk := response.read(min(_CHUNK_BYTES, limits.max_bytes + 1 - len(body))):
                body += chunk
                if len(body) > limits.max_bytes:
                    raise RequestError(f"{name}: larger than {limits.max_bytes} bytes")
            length = response.headers.get("Content-Length", "")
            expected = int(length) if length.isdecimal() else 0
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set():
            raise RequestError(f"{name}: did not arrive within {limits.timeout_s:g} s") from error
        raise RequestError(f"{name}: cannot be fetched: {error}") from error
    finally:
        timer.cancel()
        for each in sockets:
            each.close()
    if expired.is_set():
        raise RequestError(f"{name}: did not arrive within {limits.timeout_s:g} s")
    if len(body) < expected:
        raise RequestError(f"{name}: the connection ended after {len(body)} of {expected} bytes")
    return bytes(body)


def _opener(sockets: list[socket.socket], expired: threading.Event) -> urllib.request.OpenerDirector:
    """http and https, proxies and redirects between those: urllib's own opener also reads ftp:, file: and data:."""

    class Http(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            # a duplicate: TLS takes the socket itself away before its handshake
            sockets.append(self.sock.dup())
            if expired.is_set():
                raise TimeoutError("connected too late")

    class Https(http.client.HTTPSConnection, Http):
        """Between the connection and the handshake, the former's connect() calls the latter's."""

    class Redirects(urllib.request.HTTPRedirectHandler):
        def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
            # urllib would read the whole body, however long, before it follows
            fp.close()
            return super().http_error_302(req, fp, code, msg, headers)

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

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
        Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
