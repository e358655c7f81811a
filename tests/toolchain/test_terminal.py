"""What the command line shows on a terminal of 80 columns, and what it tells a shell that completes its lines."""

import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from qwen2vl_tc.toolchain.cli.console import clean
from qwen2vl_tc.toolchain.cli.main import app

from .conftest import Run

SCRIPT = str(Path(sys.executable).parent / "qwen2vl-tc")
GROUP: Any = typer.main.get_command(app)
COMMANDS = {"": GROUP, **GROUP.commands}


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: name or "root")
def test_no_option_is_cut_at_80_columns(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(*name.split(), "--help").stdout
    assert "\u2026" not in shown
    assert max(map(len, shown.splitlines())) <= 80
    words = shown.replace("\u2502", " ").split()
    for parameter in COMMANDS[name].params:
        if parameter.param_type_name == "option":
            whole = [*parameter.opts, *parameter.secondary_opts, *([parameter.metavar] if parameter.metavar else [])]
            assert [text for text in whole if text not in words] == []


@pytest.mark.parametrize("name", COMMANDS, ids=lambda name: name or "root")
def test_help_shows_every_word_that_it_was_given(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "600")
    shown = " ".join(run(*name.split(), "--help").stdout.replace("\u2502", " ").split())
    texts = [COMMANDS[name].help, *(getattr(each, "help", None) for each in COMMANDS[name].params)]
    for text in texts:
        # the one escape that markup knows
        assert " ".join((text or "").replace("\\[", "[").split()) in shown


HOSTILE = "--\x1b[31mx\u202ey"


@pytest.mark.parametrize(
    "words",
    [
        [HOSTILE],
        [HOSTILE, "inspect"],
        ["inspect", HOSTILE],
        ["bench", "cold-start", "x", HOSTILE],
        ["generate", "x", "--top-k", HOSTILE],
        ["generate", "x", HOSTILE[2:]],
        ["doctor", "x", HOSTILE[2:] + "\udcff"],
        [HOSTILE[2:]],
    ],
)
def test_a_usage_error_cannot_steer_the_terminal(words: list[str], run: Run) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert "Usage" in result.stderr
    assert not {"\x1b", "\u202e"} & set(result.stderr)
    assert clean(result.stderr) == result.stderr


def test_a_usage_error_about_a_variable_cannot_steer_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN2VL_TC_DEBUG", HOSTILE)
    result = run("doctor")
    assert result.exit_code == 2
    assert not {"\x1b", "\u202e"} & set(result.stderr)


def on_terminal(*words: str | Path) -> str:
    """What a command shows on a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "dumb"}
    process = subprocess.Popen([SCRIPT, *words], stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    shown = b""
    # a terminal whose other side is closed is an error to read
    while True:
        try:
            piece = os.read(ours, 1 << 16)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    return shown.decode()


def test_no_table_is_cut_at_80_columns(built: Path, run: Run, tmp_path: Path) -> None:
    # as many columns as there are batch sizes
    copy = Path(shutil.copytree(built, tmp_path / ("a" * 90 + ".artifact")))
    assert run("compile", copy, "--max-length", 64, "--batch", "1,2,4,8,16,100").exit_code == 0
    for words in (("inspect", copy), ("doctor", copy)):
        shown = on_terminal(*words)
        assert "\u2026" not in shown
        assert max(map(len, shown.splitlines())) <= 80
    assert all(name in shown.replace("\n", "") for name in ("torch", "transformers"))


def test_names_of_an_artifact_are_no_markup(built: Path, run: Run, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "artifact"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["name"] = "[/red]model"
    manifest["ge"]["soc"] = "[/red]soc"
    for graph in manifest["ge"]["graphs"]:
        graph["name"] = f"[/red]{graph['name']}[bold"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run("inspect", copy)
    assert result.exit_code in (0, 2)
    assert "[/red]" in result.output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands_and_options(shell: str) -> None:
    def complete(line: str) -> str:
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_TYPER_COMPLETE_ARGS": line}
        action = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
        environment = {**os.environ, **words, **action, "_QWEN2VL_TC_COMPLETE": f"complete_{shell}"}
        return subprocess.run([SCRIPT], env=environment, capture_output=True, text=True).stdout

    assert "inspect" in complete("qwen2vl-tc in")
    assert "--max-length" in complete("qwen2vl-tc compile --max")
    # the option takes a shell's name where none is found among the parents, which a test must not depend on
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    shown = subprocess.run([SCRIPT, "--show-completion", shell], env=environment, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "_QWEN2VL_TC_COMPLETE" in shown.stdout
