"""What is printed cannot steer the terminal, whoever wrote it; JSON keeps its values."""

import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers.released import unpack
from rich.table import Table
from rich.text import Text
from typer.testing import CliRunner

from qwen2vl_tc.artifacts.store import read_manifest
from qwen2vl_tc.toolchain.cli import console
from qwen2vl_tc.toolchain.cli.main import app

HARMFUL = ["\x1b", "\x07", "\x08", "\r", "\x00", "\x7f", "\x9b", "\x85", "\u2028", "\u2029", "\ud800"]
HARMFUL += ["\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))]
# a family is three people held together by zero-width joiners
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
HARMLESS = f"plain [bold]text[/] :smile: caf\u00e9 \u65e5\u672c \u05e9\u05dc\u05d5\u05dd {FAMILY} \ufffd"
FORGED = "\x1b[2K\rverification: passed\u202e[/bold] \u2066"


@pytest.mark.parametrize("character", HARMFUL, ids=ascii)
def test_every_way_of_printing_shows_a_mark_in_place_of(character: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"<{character}>"
    table = Table(text, title=text, caption=text)
    table.add_row(text)
    table.add_row(Text(text, "red"))
    for write in (console.note, console.warn, console.result):
        write(text)
    console.fail(f"x{text}")
    for make in (console.stdout, console.stderr):
        make().print(table)
        make().print(text, style="bold")
    printed = "".join(capsys.readouterr())
    assert character not in printed
    assert printed.count("\ufffd") >= 3


def test_what_is_meant_to_be_read_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.note(HARMLESS)
    console.result(HARMLESS)
    console.write_text(f"a\n\tb {HARMLESS}")
    console.stdout().print(HARMLESS)
    out, err = capsys.readouterr()
    assert out == f"{HARMLESS}\na\n\tb {HARMLESS}{HARMLESS}\n"
    assert err == HARMLESS + "\n"


def test_one_note_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    console.warn("limit\nverification: passed")
    assert capsys.readouterr().err == "warning: limit verification: passed\n"


@pytest.mark.parametrize("indent", [2, None])
def test_json_is_clean_and_keeps_its_values(indent: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    value = {f"key{c}": [f"value{c}", HARMLESS] for c in HARMFUL}
    console.result_json(value, indent)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert not set(HARMFUL) & set(printed)
    assert HARMLESS.encode() in printed.encode()


def test_generated_text_is_cleaned_on_a_terminal_and_whole_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.write_text(f"a\n\tb{FORGED}")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.write_text(f"a\n\tb{FORGED}")
    shown = "a\n\tb\ufffd[2K\ufffdverification: passed\ufffd[/bold] \ufffd"
    assert capsys.readouterr().out == f"a\n\tb{FORGED}{shown}"


def test_a_terminal_gets_colours_and_bars_but_no_codes_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with console.step_progress("compile") as step:
        step("layer [/]\x1b]0;title\x07\u202e", 1, 2)
    console.stderr().print(Text("red\x1b[5m", "red"))
    shown = terminal.getvalue()
    assert "\x1b[31mred\ufffd[5m" in shown
    assert "layer [/]\ufffd]0;titl" in shown
    assert "\x07" not in shown and "\u202e" not in shown


def test_an_artifact_cannot_forge_what_commands_say(tmp_path: Path) -> None:
    artifact = unpack(tmp_path / "artifact")
    manifest = dataclasses.replace(read_manifest(artifact), name=FORGED)
    assert manifest.ge is not None
    forged = dataclasses.replace(manifest, ge=dataclasses.replace(manifest.ge, soc=FORGED, limits=(FORGED,)))
    (artifact / "manifest.json").write_bytes(forged.to_bytes())
    bare = shutil.copytree(artifact, tmp_path / "bare")
    plain = json.loads((artifact / "manifest.json").read_bytes())
    (bare / "manifest.json").write_text(json.dumps({**plain, FORGED: 1}))
    for words in (["inspect", artifact], ["inspect", artifact, "--json"], ["inspect", bare], ["generate", bare]):
        words += ["--prompt", "x"] * (words[0] == "generate")
        done = CliRunner().invoke(app, [str(word) for word in words])
        printed = done.stdout + done.stderr
        assert done.exit_code in (0, 2) and "verification: passed" in printed
        assert not set(HARMFUL) & set(printed)
