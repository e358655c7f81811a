"""The chat in a terminal and in a pipe."""

import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.synthetic import tiny_config

from qwen2vl_tc.runtime import Model, load
from qwen2vl_tc.toolchain.cli import chat

from .conftest import Run

SETTINGS = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("requests", tiny_config(), batches="1,4", max_length=2304)
    assert isinstance(path, Path)
    return path


@pytest.fixture(scope="module")
def model(artifact: Path) -> Model:
    return load(artifact)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(lines: list[str | type[BaseException]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A person at the keyboard: lines, then Ctrl-D."""
    waiting = iter([*lines, EOFError])

    def next_line(prompt: str = "") -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", next_line)


def test_a_person_who_errs_is_told_and_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(["", "/nonsense", "/image", "/image absent.png", "What is this?", "/help", "Hello"], monkeypatch)
    conversation = model.chat()
    chat.run_chat(conversation, [], [], SETTINGS)
    out, err = capsys.readouterr()
    assert "error: /nonsense: unknown or incomplete" in err
    assert "error: /image: unknown or incomplete" in err
    assert "absent.png: cannot be opened" in err
    assert "/reset" in err
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"], "one turn was answered"
    assert conversation.messages[-1]["content"] in out


def test_a_clip_without_pyav_is_named_and_the_chat_goes_on(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"a clip")
    monkeypatch.setitem(sys.modules, "av", None)
    typed(["What happens?", "Hello"], monkeypatch)
    conversation = model.chat()
    chat.run_chat(conversation, [], [str(clip)], SETTINGS)
    assert "qwen2vl-tc[video]" in capsys.readouterr().err
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"], "one turn was answered"


def test_reset_starts_anew_and_drops_pictures_that_wait(
    model: Model, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(["Hello", f"/image {picture}", "/reset", "Hello"], monkeypatch)
    chat.run_chat(model.chat(), [], [], SETTINGS)
    out, err = capsys.readouterr()
    alone = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=6).text
    assert out == f"{alone}\n{alone}\n"
    assert err.count("; 0 of ") == 2, "nothing of the first conversation is kept"


def test_ctrl_c_ends_the_answer_and_not_the_chat(
    model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(["Tell me a story.", "Shorter."], monkeypatch)
    write = chat.write_text
    pieces: Iterator[int] = iter(range(10**6))

    def interrupted(piece: str) -> None:
        write(piece)
        if next(pieces) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write_text", interrupted)
    conversation = model.chat()
    chat.run_chat(conversation, [], [], {"max_new_tokens": 20, "min_new_tokens": 20})
    assert "interrupted; the conversation goes on" in capsys.readouterr().err
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_a_piped_chat_that_cannot_be_answered_fails_with_code_2(run: Run, artifact: Path) -> None:
    from typer.testing import CliRunner

    from qwen2vl_tc.toolchain.cli.main import app

    result = CliRunner().invoke(app, ["chat", str(artifact)], input="/image absent.png\nWhat is this?\nHello\n")
    assert result.exit_code == 2
    assert "absent.png: cannot be opened" in result.stderr
    assert result.stdout == ""


def test_ctrl_c_ends_generate_with_what_was_said_and_no_traceback(artifact: Path) -> None:
    words = ["generate", str(artifact), "--prompt", "Hi", "--max-new-tokens", "2200", "--min-new-tokens", "2200"]
    process = subprocess.Popen(
        [sys.executable, "-m", "qwen2vl_tc.toolchain", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert first
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in err
