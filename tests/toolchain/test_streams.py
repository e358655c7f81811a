"""The command line on standard streams that are closed, full, unread, or of a narrow encoding."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qwen2vl_tc.toolchain.demo import CHECKPOINT

SCRIPT = shlex.quote(str(Path(sys.executable).parent / "qwen2vl-tc"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's weights and graphs, with ONNX models."""
    path = tmp_path_factory.mktemp("streams") / "a"
    steps = (f"convert --src {CHECKPOINT} --no-sync --out", "compile", "compile --mode onnx --max-length 256")
    for words in steps:
        subprocess.run([SCRIPT, *words.split(), str(path)], check=True, capture_output=True)
    return path


def shell(line: str, artifact: Path, **environment: str) -> tuple[int, str]:
    """The exit code of `qwen2vl-tc <line>`, A being the artifact, and what it said on the streams that were left."""
    words = f"A={shlex.quote(str(artifact))}; {SCRIPT} {line}"
    done = subprocess.run(
        ["bash", "-c", words], capture_output=True, env={**os.environ, **environment}, cwd=artifact.parent, timeout=60
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    assert "Traceback" not in text and "this is a bug" not in text, text
    return done.returncode, text


ANSWER = "generate $A --prompt x --max-new-tokens 2"


@pytest.mark.parametrize("line", [ANSWER, "--version", "--help"])
def test_a_closed_output_is_refused_before_anything_is_done(line: str, artifact: Path) -> None:
    assert shell(f"{line} >&-", artifact) == (
        2,
        "error: standard output is closed; send it to a file, or to /dev/null\n",
    )


def test_nothing_is_written_where_the_output_is_closed(artifact: Path) -> None:
    assert shell(f"convert --src {CHECKPOINT} --no-sync --out closed >&-", artifact)[0] == 2
    assert not (artifact.parent / "closed").exists()


@pytest.mark.parametrize("line", [ANSWER, "inspect $A", "--version", "bench --help"])
def test_a_full_output_is_an_error_that_names_it(line: str, artifact: Path) -> None:
    code, said = shell(f"{line} >/dev/full", artifact)
    assert code == 2
    assert said.splitlines()[-1] == "error: standard output: No space left on device"


@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full"])
def test_a_command_does_its_work_where_nobody_reads_its_messages(closed: str, artifact: Path) -> None:
    shutil.rmtree(artifact.parent / "silent", ignore_errors=True)
    code, said = shell(f"convert --src {CHECKPOINT} --no-sync --out silent {closed}", artifact)
    assert code == 0
    assert said.startswith("wrote silent: ")
    assert (artifact.parent / "silent/manifest.json").is_file()
    assert shell(f"inspect absent {closed}", artifact) == (2, "")
    assert shell(f"inspect --nonsense {closed}", artifact) == (2, "")


def test_files_do_not_take_the_numbers_of_closed_streams(artifact: Path) -> None:
    """Messages would be written into the file that was opened first."""
    out = artifact.parent / "whole"
    assert shell(f"convert --src {CHECKPOINT} --no-sync --out whole <&- 2>&-", artifact)[0] == 0
    assert shell(f"inspect {out} --json", artifact)[0] == 0


def test_a_closed_input_is_an_empty_one(artifact: Path) -> None:
    code, said = shell("chat $A <&-", artifact)
    assert code == 0
    assert said.startswith("backend: ")


@pytest.mark.parametrize("line", ["inspect $A", "inspect $A --json", "--version", "--help"])
def test_a_reader_that_goes_away_is_the_shell_s_code_for_it(line: str, artifact: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        ["bash", "-c", f"A={artifact}; {SCRIPT} {line}"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 141
    assert "error" not in done.stderr and "Traceback" not in done.stderr and "ignored" not in done.stderr


NARROW = [
    {"PYTHONIOENCODING": "latin-1"},
    {"PYTHONIOENCODING": "gbk"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_what_an_encoding_lacks_becomes_an_escape(narrow: dict[str, str], artifact: Path) -> None:
    named = artifact.with_name("na\u00efve-\u4e2d")
    shutil.copytree(artifact, named, dirs_exist_ok=True)
    for line in ("inspect $A", "inspect --help", "sign $A --key x"):
        assert shell(line, named, **narrow)[0] in (0, 2)
    code, said = shell(
        "bench $A --size 56x56 --runs 1 --warmup 0 --max-new-tokens 2 --json 2>/dev/null", named, **narrow
    )
    assert code == 0
    assert os.fsencode(json.loads(said)["artifact"]) == os.fsencode(named)


def test_input_that_is_not_utf_8_is_an_error_that_says_so(artifact: Path) -> None:
    for line in ("chat $A < <(printf 'caf\\xe9\\n')", "generate $A --prompt $(printf 'caf\\xe9')"):
        code, said = shell(line, artifact, PYTHONUTF8="1")
        assert code == 2 and "is not UTF-8" in said


@pytest.mark.parametrize("utf8", ["0", "1"])
def test_folders_whose_names_are_not_utf_8_serve_as_any_others(utf8: str, artifact: Path) -> None:
    name = f"$(printf 'caf\\xe9-{utf8}')"
    # its graphs stay, so that nothing is traced
    shutil.copytree(artifact, artifact.parent / os.fsdecode(b"caf\xe9-" + utf8.encode()))
    lines = (
        f"convert --src {CHECKPOINT} --no-sync --out {name}",
        f"compile {name} --mode onnx --max-length 256",
        f"generate {name} --prompt x --max-new-tokens 2",
        f"bench {name} --size 56x56 --runs 1 --warmup 0 --max-new-tokens 2 --json",
    )
    for line in lines:
        code, said = shell(line, artifact, PYTHONUTF8=utf8)
        assert code == 0, said


def test_memory_that_is_not_there_is_the_machine_s_fault(artifact: Path) -> None:
    code, said = shell("bench $A --size 99999x99999", artifact)
    assert (code, "at most" in said) == (2, True)
    words = f"ulimit -v 300000; {SCRIPT} {ANSWER.replace('$A', str(artifact))}"
    done = subprocess.run(["bash", "-c", words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: " in done.stderr and "memory" in done.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_verify_without_a_package_says_what_to_install(missing: str, artifact: Path) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None; from qwen2vl_tc.toolchain.cli.main import app; "
        f"app(['verify', {str(artifact)!r}, '--against', {str(CHECKPOINT)!r}])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert missing in done.stderr.splitlines()[-1]
    assert "pip install 'qwen2vl-tc[compile]'" in done.stderr
