"""Requests from files and options: read as people write them, and checked before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from qwen2vl_tc import runtime
from qwen2vl_tc.artifacts.errors import RequestError
from qwen2vl_tc.toolchain.cli.main import app
from qwen2vl_tc.toolchain.cli.values import requests_file

from .conftest import Run

ASKED = [{"role": "user", "content": "What?"}]


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "requests.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n  \n"])
def test_lines_are_lists_of_messages_or_objects_that_hold_one_with_a_byte_order_mark_or_without(
    tmp_path: Path, mark: bytes, end: str
) -> None:
    lines = [json.dumps(ASKED), json.dumps({"messages": ASKED}), json.dumps([{"role": "user", "content": "\u2028"}])]
    path = written(tmp_path, mark + end.join([*lines, ""]).encode())
    assert requests_file(path) == [ASKED, ASKED, [{"role": "user", "content": "\u2028"}]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('[{"role": "user", "role": "system", "content": "x"}]', "'role' appears twice"),
        ('{"messages": [], "messages": []}', "'messages' appears twice"),
        ('[{"role": "user", "content": [{"type": "image", "image": "a", "image": "b"}]}]', "'image' appears twice"),
        ('{"messages": [], "images": ["a.png"]}', "an object with messages, images, expected a list of messages"),
        ('{"role": "user", "content": "x"}', "an object with role, content, expected"),
        ("{}", "an object with no keys"),
        ("[", "not valid JSON"),
        ("\ufeff[]", "not valid JSON"),
    ],
)
def test_a_line_that_is_neither_is_refused_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path, f"{json.dumps(ASKED)}\n\n{line}\n")
    with pytest.raises(RequestError, match=rf"requests\.jsonl:3: .*{said}"):
        requests_file(path)


@pytest.fixture
def never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*given: Any, **named: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(runtime, "load", load)


def refused(*words: str | Path) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "absent.png"], "absent.png: cannot be opened"),
        (["--image", "there.png", "--image", "absent.png"], "absent.png: cannot be opened"),
        (["--video", "absent.mp4"], "absent.mp4: cannot be opened"),
        (["--image", "."], ".: not a file"),
        (["--image", "http://127.0.0.1:9/a.png"], "--allow-http"),
    ],
)
def test_a_missing_picture_is_noticed_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("there.png")
    assert said in refused("generate", "artifact", "--prompt", "x", *words)
    assert said in refused("chat", "artifact", *words)


@pytest.mark.usefixtures("never_loaded")
@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "image", "image": "absent.png"}, "absent.png: cannot be opened"),
        ({"type": "video", "video": ["there.png", "absent.png"]}, "absent.png: cannot be opened"),
        ({"type": "image_url", "image_url": {"url": "absent.png"}}, "absent.png: cannot be opened"),
        ({"type": "image"}, 'has no "image"'),
        ({"type": "sound"}, "type 'sound'"),
    ],
)
def test_a_request_of_a_file_is_checked_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, item: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("there.png")
    path = written(tmp_path, f"{json.dumps(ASKED)}\n{json.dumps([{'role': 'user', 'content': [item]}])}\n")
    line = refused("generate", "artifact", "--requests", path)
    assert "requests[1]: messages[0].content[0]" in line and said in line


@pytest.mark.parametrize(
    "source", [" http://u:hunter2@h/x", "https:/u:hunter2@h/x", "ftp://u:hunter2@h/x", "s3://key:hunter2@b/x"]
)
def test_no_password_of_a_source_is_repeated_whichever_way_it_was_given(source: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    contents: list[Any] = [
        [{"type": "image", "image": source}],
        [{"type": "image_url", "image_url": {"url": source}}],
        [{"type": "video", "video": source}],
        [{"type": "video", "video": [source, source]}],
        [source],
        [[source]],
    ]
    ways: list[list[Any]] = [
        ["generate", "absent", "--prompt", "x", "--image", source],
        ["generate", "absent", "--prompt", "x", "--video", source],
        ["chat", "absent", "--image", source],
        *(["generate", "absent", "--requests", file, content] for content in contents),
    ]
    for way in ways:
        if isinstance(way[-1], list):
            file.write_text(json.dumps([{"role": "user", "content": way.pop()}]) + "\n")
        result = run(*way)
        assert result.exit_code == 2
        assert "error: " in result.stderr and "hunter2" not in result.output
        assert "absent" not in result.stderr, "it is noticed before the artifact is loaded"


@pytest.mark.parametrize(("name", "said"), [(".", "Is a directory"), ("absent", "No such file")])
def test_requests_that_cannot_be_read_are_named(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(RequestError, match=rf"{tmp_path / name}: cannot read: {said}.*; --requests is a file"):
        requests_file(tmp_path / name)
