"""http(s) sources: fetched only where allowed, within limits of size and time, from http(s) alone."""

import base64
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.runtime.pictures import fetch as fetching
from qwen2vl_tc.runtime.pictures.addresses import is_internal
from qwen2vl_tc.runtime.pictures.images import load_image
from qwen2vl_tc.runtime.pictures.sources import LOCAL_ONLY, HttpLimits, check_there, describe, readable
from qwen2vl_tc.runtime.text.messages import vision_items

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
        elif self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to?"))
            self.end_headers()
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
        elif self.path.partition("?")[0] in ("/a.png", "/short"):
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


PRIVATE = "10.0.0.1 172.16.0.1 192.168.1.1 127.0.0.1 127.9.9.9 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 240.0.0.1 "
PRIVATE += (
    "255.255.255.255 192.0.2.1 198.18.0.1 :: ::1 fe80::1 fe80::1%eth0 fc00::1 fd12::1 ff02::1 fec0::1 2001:db8::1 "
)
PRIVATE += "::ffff:127.0.0.1 ::ffff:10.0.0.1 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 2002:7f00:1:: 2002:a00:1::"


@pytest.mark.parametrize("address", PRIVATE.split())
def test_an_address_of_the_machine_or_its_network_is_internal_however_it_is_written(address: str) -> None:
    assert is_internal(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_an_address_of_the_internet_is_not_internal(address: str) -> None:
    assert not is_internal(address)


class Names:
    """What names resolve to, and which addresses count as internal: 127.0.0.1, where the server is, does not."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.known = {
            "outside.test": ["127.0.0.1"],
            "inside.test": ["127.0.0.2"],
            "both.test": ["127.0.0.1", "127.0.0.2"],
        }
        self.connected: list[str] = []
        look_up, connect = socket.getaddrinfo, socket.create_connection

        def found(host: Any, *given: Any, **named: Any) -> Any:
            return [each for name in self.known.get(host, [host]) for each in look_up(name, *given, **named)]

        def connected(place: Any, *given: Any, **named: Any) -> Any:
            self.connected.append(place[0])
            return connect(place, *given, **named)

        patch.setattr(socket, "getaddrinfo", found)
        patch.setattr(socket, "create_connection", connected)
        patch.setattr(fetching, "is_internal", lambda address: address != "127.0.0.1")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.mark.parametrize(
    "target",
    ["http://inside.test:9/a.png", "http://127.0.0.2:9/a.png", "http://both.test:9/", "http://127.2:9/", "//[::1]:9/"],
)
def test_a_redirect_from_outside_does_not_lead_inside(server: str, names: Names, target: str) -> None:
    url = server.replace("127.0.0.1", "outside.test") + "/to?" + target
    with pytest.raises(RequestError, match=r"redirects to .*, an address of this machine or its network"):
        load_image(url, ALLOWED)
    assert names.connected == ["127.0.0.1"], "nothing is sent to where it leads"


def test_every_redirect_on_the_way_is_looked_at(server: str, names: Names) -> None:
    outside = server.replace("127.0.0.1", "outside.test")
    url = f"{outside}/to?{outside}/to?http://inside.test:9/a.png"
    with pytest.raises(RequestError, match=r"redirects to 127\.0\.0\.2"):
        load_image(url, ALLOWED)
    assert load_image(f"{outside}/to?{outside}/a.png", ALLOWED).size == (30, 40)


def test_a_name_that_changes_its_address_leads_nowhere_but_to_what_was_checked(server: str, names: Names) -> None:
    url = server.replace("127.0.0.1", "outside.test") + "/to?/a.png"
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])
    names.known = {}

    class Changing(dict[str, list[str]]):
        def get(self, host: Any, default: Any = None) -> Any:
            return next(answers) if host == "outside.test" else default

    names.known = Changing()
    with pytest.raises(RequestError, match=r"redirects to 127\.0\.0\.2"):
        load_image(url, ALLOWED)
    assert names.connected == ["127.0.0.1"]


def test_a_url_that_is_given_may_be_inside_and_redirect_within_its_own_server_alone(server: str, names: Names) -> None:
    names.known["inside.test"] = ["127.0.0.1"]
    port = server.rpartition(":")[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "is_internal", lambda address: True)
        inside = f"http://inside.test:{port}"
        assert load_image(f"{inside}/a.png", ALLOWED).size == (30, 40)
        assert load_image(f"{inside}/moved", ALLOWED).size == (30, 40)
        for other in (f"http://127.0.0.1:{port}/a.png", "http://inside.test:9/a.png"):
            with pytest.raises(RequestError, match=r"redirects to 127\.0\.0\.1"):
                load_image(f"{inside}/to?{other}", ALLOWED)


def test_a_redirect_through_a_proxy_is_looked_at_too(
    server: str, names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://inside.test/a.png")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with pytest.raises(RequestError, match=r"redirects to 127\.0\.0\.2"):
            load_image("http://outside.test/a.png", ALLOWED)
        proxy.shutdown()


SECRET = "s3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{SECRET}@127.0.0.1:9/a.png",
        f"https://{SECRET}@127.0.0.1:9/a.png",
        f"HTTP://user:{SECRET}@[::1/a.png",
        f"http://user:a/{SECRET}@127.0.0.1:9/a.png",
        f"http://user:a?{SECRET}@127.0.0.1:9/a.png",
        f"http://user:a#{SECRET}@127.0.0.1:9/a.png",
        f"http://user:a\\{SECRET}@127.0.0.1:9/a.png",
        f"http://127.0.0.1:9/a.png?token={SECRET}",
        f"http://127.0.0.1:9/a.png#{SECRET}",
        f"http://127.0.0.1:9/a.png?a b={SECRET}",
        f"http://127.0.0.1:{SECRET}/a.png",
        f"http://127.0.0.1:9?{SECRET}",
        f"http://127.0.0.1:9\\@{SECRET}",
        f"http://user:a\n{SECRET}@127.0.0.1:9/a.png?{SECRET}",
    ],
)
def test_what_may_be_secret_in_a_url_is_in_no_error(url: str) -> None:
    messages: list[list[Any]] = [[{"role": "user", "content": [url]}], [url]]
    ways: list[Callable[[], Any]] = [
        lambda: load_image(url),
        lambda: load_image(url, ALLOWED),
        *(lambda each=each: vision_items(each, [], [], {}) for each in messages),  # type: ignore[misc]
    ]
    for way in ways:
        with pytest.raises(RequestError) as caught:
            way()
        assert SECRET not in str(caught.value)
        assert "http" in str(caught.value).lower()


@pytest.mark.parametrize(
    "url",
    [
        f" http://u:{SECRET}@h/x",
        f"\n\thttps://u:{SECRET}@h/x ",
        f"\ufeffhttp://u:{SECRET}@h/x",
        f"\x00http://u:{SECRET}@h/x",
        f"HTTP://u:{SECRET}@h/x",
        f"https:/u:{SECRET}@h/x",
        f"https:///u:{SECRET}@h/x",
        f"https:u:{SECRET}@h/x",
        f"https:\\\\u:{SECRET}@h\\x",
        f"ftp://u:{SECRET}@h/x",
        f"ftp://{SECRET}@h/x",
        f"s3://key:{SECRET}@b/x",
        f"s3://key:a/{SECRET}@b/x",
        f"s3://key:a@{SECRET}@b/x",
        f" s3://b/x?signature={SECRET}",
        f"s3://b/x?mail=a@b&signature={SECRET}",
        f"https:/h/x#{SECRET}",
        f"//u:{SECRET}@h/x",
        f"//{SECRET}@h/x",
        f"u:{SECRET}@h/x",
        f"9u:{SECRET}@h/x",
        f"file://u:{SECRET}@h/x",
        f"file://[u:{SECRET}@h/x",
        f"file://u:{SECRET}\u2100@h/x",
    ],
)
def test_a_password_is_in_no_error_however_the_url_is_mistyped(url: str) -> None:
    ways: list[Callable[[], Any]] = [
        lambda: load_image(url),
        lambda: load_image(Path(url)),
        lambda: check_there(describe(url, "video"), url, LOCAL_ONLY),
        lambda: readable(describe(url, "video"), url, LOCAL_ONLY),
        lambda: vision_items([{"role": "user", "content": [url]}], [], [], {}),
    ]
    for way in ways:
        with pytest.raises(RequestError) as caught:
            way()
        assert SECRET not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["ftp://u:p@h/x", "s3://b/x?y", "S3://b/x", " gs://b/x"])
def test_a_scheme_that_is_not_read_is_named_with_those_that_are(url: str) -> None:
    scheme = url.strip().partition(":")[0]
    with pytest.raises(
        RequestError, match=f"the scheme '{scheme}' is not supported; .*http://, https://, file:// or data:"
    ):
        load_image(url)
    with pytest.raises(RequestError, match="is not supported"):
        check_there("x", url, LOCAL_ONLY)


def test_white_space_around_a_url_is_no_part_of_it(server: str, tmp_path: Path) -> None:
    (tmp_path / "a@b.png").write_bytes(png())
    uri = (tmp_path / "a@b.png").as_uri()
    inline = "data:image/png;base64," + base64.b64encode(png()).decode()
    for url in (f" {server}/a.png\n", f"\t{uri} ", f" {inline}\n"):
        assert load_image(url, ALLOWED).size == (30, 40)


@pytest.mark.parametrize(
    "name", ["u:p@h.png", "x:/u:p@h?.png", "absent/a@b.png", "absent/a.png?x#y", "file:///a/u:p@b.png"]
)
def test_an_error_names_files_and_paths_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    if ":" in name and not name.startswith("file:"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"no picture")
    with pytest.raises(RequestError) as caught:
        load_image(name)
    assert str(caught.value).startswith(f"{name}: ")


def test_a_redirects_secrets_are_in_no_error(server: str) -> None:
    for target in (
        f"http://u:{SECRET}@127.0.0.1:9/",
        f"ftp://127.0.0.1/{SECRET}",
        f"http://[{SECRET}",
        f"/absent?{SECRET}",
    ):
        with pytest.raises(RequestError, match="cannot be fetched") as caught:
            load_image(f"{server}/to?{target}", ALLOWED)
        assert SECRET not in str(caught.value)


def test_an_error_names_the_host_and_path_of_a_url() -> None:
    with pytest.raises(
        RequestError, match=r"^http://127\.0\.0\.1:9/a\.png\?\.\.\.: cannot be fetched: Connection refused$"
    ):
        load_image("http://127.0.0.1:9/a.png?token=x", ALLOWED)


def wrapped(text: str, every: int, end: str) -> str:
    return end.join(text[i : i + every] for i in range(0, len(text), every)) + end


def test_base64_is_read_however_it_was_wrapped_or_spelled() -> None:
    data = png()
    plain = base64.b64encode(data).decode()
    url_safe = base64.urlsafe_b64encode(data).decode()
    assert "+" in plain and "/" in plain
    spellings = [
        *(wrapped(plain, 76, end) for end in ("\n", "\r\n", " ", "\t", "\r\n  ")),
        plain.rstrip("="),
        url_safe,
        url_safe.rstrip("="),
        wrapped(url_safe, 64, "\n").rstrip("=\n"),
        plain.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        wrapped(plain, 76, "%0D%0A"),
    ]
    for spelling in spellings:
        for head in ("data:image/png;base64,", "DATA:image/png;base64,", "data:;base64,"):
            assert load_image(head + spelling).size == (30, 40)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("AB+_", "one alphabet"),
        ("A", "1 characters and 0 of padding"),
        ("AAAAA", "5 characters"),
        ("AA=", "2 characters and 1 of padding"),
        ("AA==AA", "'=' at character 3"),
        ("AA*A", r"'\*' at character 3"),
        ("AA\u00a0A", "at character 3"),
    ],
)
def test_base64_that_can_be_read_in_two_ways_is_refused_by_name(data: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"^data: URI: not valid base64: .*{said}"):
        load_image("data:image/png;base64," + data)


@pytest.mark.parametrize(
    "name",
    ["a.b:c.png", "C:picture.png", "data:picture.png", "http:picture.png", "file:picture.png", "x://y:z.png", "a:b"],
)
def test_a_file_name_with_a_colon_is_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png())
    sources: list[Any] = [name, path, str(path.absolute()), path.absolute().as_uri()]
    for source in sources:
        assert load_image(source).size == (30, 40)


def test_a_path_object_is_a_file_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("data:image,x.png")
    path.write_bytes(png())
    assert load_image(path).size == (30, 40)


def test_a_missing_file_is_noticed_without_reading_anything(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_bytes(b"no picture")
    for source in (tmp_path / "there.png", (tmp_path / "there.png").as_uri(), "data:image/png;base64,??", b"", 3):
        check_there("x", source, LOCAL_ONLY)
    check_there("x", "http://127.0.0.1:9/a.png", ALLOWED)
    for source, said in (("absent.png", "cannot be opened"), (tmp_path, "not a file"), ("http://a/b", "--allow-http")):
        with pytest.raises(RequestError, match=f"x: .*{said}"):
            check_there("x", source, LOCAL_ONLY)
