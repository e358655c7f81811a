"""Where pictures and videos come from: paths, file:// URLs, data: URIs, bytes and, where allowed, http(s) URLs."""

import base64
import io
import os
import stat
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ..artifacts.errors import RequestError

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
        # here: few requests fetch, and http and TLS take 25 ms to import
        from .fetch import fetch

        return io.BytesIO(fetch(name, location, http.max_bytes, http.timeout_s))
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
