"""Where pictures and videos come from: paths, file:// URLs, data: URIs, bytes and, where allowed, http(s) URLs."""

import base64
import io
import os
import re
import stat
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from ...artifacts.errors import RequestError

_NAME_CHARACTERS = 200
_SPACE = re.compile("[ \\t\\r\\n\\f\\v]+")
_NO_BASE64 = re.compile("[^A-Za-z0-9+/_-]")
# anything that may be meant as a URL, a slash too few or too many included; an @ after file:/// is part of a path
_URL = re.compile(
    r"(?P<scheme>file://(?=/)|([a-z][a-z0-9+.-]*:/*|//+)(?!/))([^/?#\\]*@)?"
    r"(?P<place>(\[[^]/?#@]*\]|[^]\[:/?#@\\]*)(:[0-9]*)?(/[^?#]*)?)(?P<query>[?#].*)?$",
    re.IGNORECASE | re.DOTALL,
)
_SCHEME = re.compile("([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_STANDARD = str.maketrans("-_", "+/")


@dataclass(frozen=True)
class HttpLimits:
    """What may be fetched over http(s). Allow it only for requests that you trust: they name hosts of your network."""

    allowed: bool = False
    max_bytes: int = 256 << 20
    timeout_s: float = 60.0


LOCAL_ONLY = HttpLimits()


def describe(source: object, kind: str) -> str:
    """How an error names a source: its location, or what kind of thing was given. Of a URL, and of what may be meant as
    one, nothing that may be secret: no user, no password, no query.
    """
    if isinstance(source, str | os.PathLike):
        scheme = scheme_of(source)
        if scheme == "data":
            return "data: URI"
        location = str(os.fspath(source)) or f"{kind} path ''"
        if scheme or _may_be_url(location):
            location = _without_secrets(location.strip(), scheme)
        return location if len(location) <= _NAME_CHARACTERS else location[:_NAME_CHARACTERS] + "..."
    if isinstance(source, bytes):
        return f"{kind} of {len(source)} bytes"
    if hasattr(source, "dtype") and hasattr(source, "shape"):
        return f"array {source.dtype}{list(source.shape)}"
    return type(source).__name__


def _may_be_url(location: str) -> bool:
    """Whether a location that no scheme of ours begins may hold a secret all the same: a mistyped URL, one with a
    scheme that is not read here, `user:password@host`. What is there is a file, whatever it is called.
    """
    start = location.strip()
    before, at, _ = start.rpartition("@")
    suspicious = (at and ":" in before) or start.startswith("//") or _URL.match(start) is not None
    return bool(suspicious) and not os.path.exists(location)


def _without_secrets(url: str, scheme: str) -> str:
    parts = _URL.match(url)
    if parts is None:
        # a password that holds a slash, say: there is no telling what is the host
        return "http(s) URL that is not well-formed" if scheme == "http" else "URL that is not well-formed"
    return parts["scheme"] + parts["place"] + ("?..." if parts["query"] else "")


def readable(name: str, source: str | bytes | os.PathLike[str], http: HttpLimits) -> str | io.BytesIO:
    """A path to a regular file, or the bytes themselves. Raises RequestError that starts with `name`."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    location, scheme = _location(source)
    if scheme == "http":
        _check_allowed(name, http)
        # here: few requests fetch, and http and TLS take 25 ms to import
        from .fetch import fetch

        return io.BytesIO(fetch(name, location, http.max_bytes, http.timeout_s))
    if scheme == "data":
        return io.BytesIO(_inline(name, location))
    return _file(name, location, scheme)


def check_there(name: str, source: object, http: HttpLimits) -> None:
    """Raises what readable raises of a file that is missing or a URL that is not allowed; reads and fetches nothing."""
    if isinstance(source, str | os.PathLike):
        location, scheme = _location(source)
        if scheme == "http":
            _check_allowed(name, http)
        elif scheme != "data":
            _file(name, location, scheme)


def scheme_of(source: str | os.PathLike[str]) -> str:
    """ "http", "data", "file" or "": a path, colons included. A path object is always a path. White space around a URL
    is no part of it.
    """
    if not isinstance(source, str):
        return ""
    scheme, _, rest = source.partition(":")
    scheme = scheme.strip().lower()
    if scheme in ("http", "https") and rest.startswith("//"):
        return "http"
    is_url = (scheme == "data" and "," in rest) or (scheme == "file" and rest.startswith("/"))
    return scheme if is_url else ""


def _location(source: str | os.PathLike[str]) -> tuple[str, str]:
    location, scheme = os.fspath(source), scheme_of(source)
    return location.strip() if scheme else location, scheme


def _check_allowed(name: str, http: HttpLimits) -> None:
    if not http.allowed:
        raise RequestError(
            f"{name}: nothing is fetched from the network unless it is allowed (--allow-http, HttpLimits); "
            "download it and give its path"
        )


def _inline(name: str, location: str) -> bytes:
    """The bytes of a data: URI. White space in base64 is no data; both alphabets are read, with or without padding."""
    data = location.partition(",")[2]
    try:
        return base64.b64decode(data, validate=True)
    except ValueError:
        # other ways of writing it, which cost a look at every character
        data = _SPACE.sub("", unquote(data) if "%" in data else data)
    plain = data.rstrip("=")
    if strange := _NO_BASE64.search(plain):
        raise RequestError(f"{name}: not valid base64: {strange.group()!r} at character {strange.start() + 1}")
    if re.search("[-_]", plain) and re.search("[+/]", plain):
        raise RequestError(f"{name}: not valid base64: has + or / of one alphabet and - or _ of the other")
    padding = -len(plain) % 4
    if padding == 3 or len(data) - len(plain) not in (0, padding):
        raise RequestError(f"{name}: not valid base64: {len(plain)} characters and {len(data) - len(plain)} of padding")
    return base64.b64decode(plain.translate(_STANDARD) + "=" * padding)


def _file(name: str, location: str, scheme: str) -> str:
    if scheme == "file":
        try:
            url = urlsplit(location)
        except ValueError as error:
            # its text may repeat what is secret
            raise RequestError(f"{name}: not a file:// URL; write file:///absolute/path") from error
        if url.netloc not in ("", "localhost"):
            host = url.netloc.rpartition("@")[2]
            raise RequestError(f"{name}: names the host {host!r}; write file:///absolute/path")
        location = unquote(url.path)
    try:
        mode = os.stat(location).st_mode
    except (OSError, ValueError) as error:
        if other := _SCHEME.match(location.strip()):
            raise RequestError(
                f"{name}: cannot be opened: the scheme {other[1]!r} is not supported; give a path, or a URL that "
                "begins with http://, https://, file:// or data:"
            ) from error
        raise RequestError(f"{name}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    # a pipe would block and a folder fails with a riddle
    if not stat.S_ISREG(mode):
        raise RequestError(f"{name}: not a file")
    return location
