"""Fetching over http and https, bounded in bytes and in time."""

import http.client
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from ...artifacts.errors import RequestError
from .addresses import is_internal

_CHUNK_BYTES = 1 << 20


def fetch(name: str, url: str, max_bytes: int, timeout_s: float) -> bytes:
    """The body of a URL. Raises RequestError that starts with `name`, and repeats nothing else of the URL.

    A redirect leads into the machine's own network only within a server that the given URL already named there.
    A timer ends it: socket timeouts alone let a server send one byte at a time, forever. Looking up a name cannot be
    ended; nothing is sent to what it finds too late.
    """
    sockets: list[socket.socket] = []

    def expire() -> None:
        expired.set()
        for each in sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def hold(connected: socket.socket) -> socket.socket:
        # a duplicate: TLS takes the socket itself away before its handshake
        sockets.append(connected.dup())
        if expired.is_set():
            connected.close()
            raise TimeoutError("connected too late")
        return connected

    expired, timer = threading.Event(), threading.Timer(timeout_s, expire)
    timer.daemon = True
    timer.start()
    try:
        with _opener(_Visit(name, url, hold)).open(url, timeout=timeout_s) as response:
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
        raise RequestError(f"{name}: cannot be fetched: {_reason(error)}") from error
    finally:
        timer.cancel()
        for each in sockets:
            each.close()
    if expired.is_set():
        raise RequestError(f"{name}: did not arrive within {timeout_s:g} s")
    if len(body) < expected:
        raise RequestError(f"{name}: the connection ended after {len(body)} of {expected} bytes")
    return bytes(body)


def _reason(error: BaseException) -> str:
    """What went wrong, in words that neither the URL nor the server can have put there."""
    if isinstance(error, urllib.error.HTTPError):
        known = [status.phrase for status in HTTPStatus if status == error.code]
        # urllib's own text where it gives up on redirects would name their target
        return " ".join(["status", str(error.code), *known])
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, http.client.HTTPException) and not isinstance(error, http.client.InvalidURL):
        return f"not an answer that can be read ({type(error).__name__})"
    return "not a URL that can be read (one with a user or password is not)"


class _Visit:
    """Where one fetch may go: wherever its URL says, but from there not into the network around this machine."""

    def __init__(self, name: str, url: str, hold: Callable[[socket.socket], socket.socket]) -> None:
        """hold: is handed every connection that is made."""
        self._name = name
        self._hold = hold
        self._given = _server(url)
        # None until the given URL's own host is looked up
        self._began_inside: bool | None = None

    def look_up(self, url: str, host: str, port: int) -> list[str]:
        """The addresses of what `url` leads to. Raises RequestError for a redirect's target inside, OSError for none.

        They have to be what is connected to: the name may have another address next time.
        """
        addresses = [str(place[0]) for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        inside = [address for address in addresses if is_internal(address)]
        if self._began_inside is None:
            self._began_inside = bool(inside)
        elif inside and not (self._began_inside and _server(url) == self._given):
            raise RequestError(
                f"{self._name}: redirects to {inside[0]}, an address of this machine or its network, where only a URL "
                "that is given itself may lead"
            )
        return addresses

    def connection(self, kind: Any, request: urllib.request.Request) -> Any:
        """A class, to urllib, of connections that are made to addresses that were looked up, and so checked, once."""
        url = request.full_url
        _, host, port = _server(url)
        # http goes to a proxy with its whole URL, https through a tunnel
        is_proxied = request.has_proxy() or getattr(request, "_tunnel_host", None) is not None

        def connect(place: tuple[str, int], timeout: Any, source: Any) -> socket.socket:
            if is_proxied:
                # the proxy looks the name up again, which is its own affair; a redirect's has to be known here, too
                try:
                    self.look_up(url, host, port)
                except OSError:
                    if self._began_inside is not None:
                        raise
                    self._began_inside = False
                return self._hold(socket.create_connection(place, timeout, source))
            *others, last = self.look_up(url, *place)
            for address in others:
                with suppress(OSError):
                    return self._hold(socket.create_connection((address, place[1]), timeout, source))
            return self._hold(socket.create_connection((last, place[1]), timeout, source))

        def make(*given: Any, **named: Any) -> Any:
            made = kind(*given, **named)
            made._create_connection = connect
            return made

        return make


def _server(url: str) -> tuple[str, str, int]:
    """Scheme, host and port. Raises ValueError for what has none, or has a user or password, which are never sent."""
    parts = urlsplit(url)
    if set("@%\\") & set(parts.netloc) or not parts.hostname:
        raise ValueError("a user, an escape, or no host")
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _opener(visit: _Visit) -> urllib.request.OpenerDirector:
    """http and https, proxies and redirects between those: urllib's own opener also reads ftp:, file: and data:."""

    class Redirects(urllib.request.HTTPRedirectHandler):
        def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
            # urllib would read the whole body, however long, before it follows
            fp.close()
            return super().http_error_302(req, fp, code, msg, headers)

        http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    class Connections(urllib.request.AbstractHTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(visit.connection(http.client.HTTPConnection, req), req)

        def https_open(self, req: urllib.request.Request) -> Any:
            context = ssl.create_default_context()
            return self.do_open(visit.connection(http.client.HTTPSConnection, req), req, context=context)

        http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        Connections(),
        urllib.request.HTTPDefaultErrorHandler(),
        Redirects(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
