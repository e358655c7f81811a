"""Fetching over http and https, bounded in bytes and in time."""

import http.client
import socket
import ssl
import threading
import urllib.request
from contextlib import suppress
from typing import Any

from ..artifacts.errors import RequestError

_CHUNK_BYTES = 1 << 20


def fetch(name: str, url: str, max_bytes: int, timeout_s: float) -> bytes:
    """The body of a URL. Raises RequestError that starts with `name`.

    A timer ends it: socket timeouts alone let a server send one byte at a time, forever. Looking up a name cannot be
    ended; nothing is sent to what it finds too late.
    """
    sockets: list[socket.socket] = []

    def expire() -> None:
        expired.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    expired, timer = threading.Event(), threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        with _opener(sockets, expired).open(url, timeout=timeout_s) as response:
            body = bytearray()
            while chunk := response.read(min(_CHUNK_BYTES, max_bytes + 1 - len(body))):
                body += chunk
                if len(body) > max_bytes:
                    raise RequestError(f"{name}: larger than {max_bytes} bytes")
            length = response.headers.get("Content-Length", "")
            expected = int(length) if length.isdecimal() else 0
    except (OSError, http.client.HTTPException, ValueError) as error:
        if expired.is_set():
            raise RequestError(f"{name}: did not arrive within {timeout_s:g} s") from error
        raise RequestError(f"{name}: cannot be fetched: {error}") from error
    finally:
        timer.cancel()
        for each in sockets:
            each.close()
    if expired.is_set():
        raise RequestError(f"{name}: did not arrive within {timeout_s:g} s")
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
