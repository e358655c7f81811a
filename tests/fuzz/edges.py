"""Seeded command lines of values, files and streams that no one means to give: each must end by itself, in words.

What is asserted is what a script may rely on: an exit code of those that are documented and never the one that stands
for a bug of ours, no traceback, and an end.
"""

import os
import random
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from qwen2vl_tc.toolchain.cli.errors import BROKEN_PIPE, FAILED, REFUSED
from qwen2vl_tc.toolchain.cli.main import app
from qwen2vl_tc.toolchain.demo import CHECKPOINT

# answered, refused by the tolerance, by us, and a reader that has gone away
DOCUMENTED = (0, FAILED, REFUSED, BROKEN_PIPE)
SECONDS = 60.0
# of address space: a value that asks for more is refused before it is taken
MEMORY_BYTES = 8 << 30
# they run for long, open a device, or change more than the folder that they are given
_LEFT_OUT = ("build", "demo", "warm", "verify", "bench cold-start")
_NUMBERS = (
    *("0", "1", "-1", "2", "7", "64", "257", "99999", "4294967296", "9223372036854775808", "-9223372036854775809"),
    *("9" * 30, "9" * 5000, "1e3", "0x10", "1_000", "1.5", "-0.0", "0.1", "1e308", "1e999", "nan", "inf", "-inf", ""),
    *(" 1", "\u0663", "\u00b2", "1,1", "1,,2", ",", "1,2,4", "1x1", "56x56", "0x0", "9x9x9", "100000x100000", "x"),
)
_TEXTS = (
    *(
        "",
        " ",
        "x",
        "-",
        "--",
        "\u00e9\u4e2d\U0001f600",
        "[/red]",
        "[bold]",
        "%s%n",
        "{0}",
        "\x1b[2J",
        "a\nb",
        "a" * 9000,
    ),
    *("\udce9", "\u202e", "<|im_end|>", "{{ 1 }}", "fused", "recipe", "onnx", "dynamo", "air", "int8", "int4", "fp32"),
    *("bf16", "pbtxt", "reference", "onnxruntime", "npu", "eager", "qwen", "transformers", "text", "visual", "none"),
)
_STREAMS = (*[""] * 12, "<&-", ">&-", "2>&-", ">/dev/full", "2>/dev/full", "</dev/zero", "| true", "<&- 2>&-")
_ENVIRONMENTS: tuple[dict[str, str], ...] = (
    *({},) * 6,
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    {"COLUMNS": "1"},
    {"COLUMNS": "x", "QWEN2VL_TC_DEBUG": "maybe"},
    {"QWEN2VL_TC_THREADS": "-1"},
    {"EXE_MODE": "x"},
)


@dataclass(frozen=True)
class Line:
    """Words, what is done with the streams, and variables of the environment."""

    words: tuple[str, ...]
    streams: str
    environment: dict[str, str]

    def __str__(self) -> str:
        return " ".join([*(f"{k}={v}" for k, v in self.environment.items()), shlex.join(self.words), self.streams])[
            :400
        ]


def make_files(artifact: Path, folder: Path) -> tuple[str, ...]:
    """Paths of every kind in `folder`: what to work with, and what is something else than it should be."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "full").mkdir(parents=True)
    (folder / "full" / "file").write_text("x")
    shutil.copytree(artifact, folder / "a")
    shutil.copytree(CHECKPOINT, folder / "hf")
    shutil.copytree(artifact, os.fsdecode(bytes(folder) + b"/caf\xe9"))
    (folder / "empty").touch()
    (folder / "lines.jsonl").write_text('[{"role": "user", "content": "x"}]\n[]\n{}\n1\n')
    (folder / "bytes").write_bytes(bytes(range(256)) * 8)
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling").symlink_to("nowhere/x")
    names = ("a", "a", "a", "hf", "caf\udce9", "empty", "lines.jsonl", "bytes", "fifo", "loop", "dangling", "full", ".")
    return (
        *names,
        "full/file/x",
        "absent",
        "hf/config.json",
        "/dev/null",
        "/dev/full",
        "/",
        "x" * 300,
        "a/manifest.json",
    )


def command_line(rng: random.Random, files: tuple[str, ...]) -> Line:
    """A command with some of its options, each with a value that may be of its kind."""
    commands: dict[str, Any] = {k: v for k, v in GROUP.commands.items() if k not in _LEFT_OUT}
    name = rng.choice(sorted(commands))
    words = name.split()
    for parameter in commands[name].params:
        if parameter.param_type_name == "argument":
            words.append("a" if rng.random() < 0.6 else rng.choice(files))
        elif (parameter.required or rng.random() < 0.25) and "--help" not in parameter.opts:
            words.append(rng.choice([*parameter.opts, *parameter.secondary_opts]))
            if not parameter.is_flag:
                words.append(_value(rng, parameter, files))
    if name in ("generate", "bench") and "--max-new-tokens" not in words:
        words += ["--max-new-tokens", "2"]
    if name == "generate" and "--prompt" not in words and "--requests" not in words:
        words += ["--prompt", rng.choice(_TEXTS)]
    return Line(tuple(words), rng.choice(_STREAMS), rng.choice(_ENVIRONMENTS))


def _value(rng: random.Random, parameter: Any, files: tuple[str, ...]) -> str:
    kinds: list[tuple[str, ...]] = [_NUMBERS, _TEXTS, files]
    kind = str(parameter.metavar)
    likely = (
        files
        if kind in ("FILE", "DIR", "ARTIFACT", "PEM")
        else _NUMBERS
        if kind in ("N", "X", "WxH", "N,...")
        else _TEXTS
    )
    value: str = rng.choice(likely if rng.random() < 0.7 else rng.choice(kinds))
    return value


GROUP: Any = typer.main.get_command(app)
# limits memory, then becomes the command
_START = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_BYTES}, {MEMORY_BYTES}))
from qwen2vl_tc.toolchain.cli.main import main
main()
"""


def run(line: Line, folder: Path) -> str | None:
    """What is wrong with how a command line ends, or None."""
    # the words go by position: a shell would need them quoted, and a null byte is none of them
    script = f'exec "$@" {line.streams}' if "|" not in line.streams else f'"$@" {line.streams}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", script, "bash", sys.executable, "-c", _START, *line.words]
    environment = {**os.environ, "QWEN2VL_TC_THREADS": "1", **line.environment}
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return f"{line}: no end after {SECONDS:.0f} s"
    said = (out + err).decode(errors="replace")
    if "maybe" not in line.environment.values() and "Traceback" in said:
        return f"{line}: a traceback: {said[-600:]}"
    if process.returncode not in DOCUMENTED or (process.returncode == FAILED and line.words[0] != "verify"):
        return f"{line}: exit code {process.returncode}: {said[-400:]}"
    return None


def fuzz(artifact: Path, folder: Path, runs: int, seed: int) -> list[str]:
    """What is wrong, of `runs` command lines over files in `folder`."""
    problems = []
    for number in range(runs):
        rng = random.Random(f"{seed} edges {number}")
        if number % 20 == 0:
            # some of them write
            files = make_files(artifact, folder)
        if (problem := run(command_line(rng, files), folder)) is not None:
            problems.append(f"number {number}: {problem}")
    return problems
