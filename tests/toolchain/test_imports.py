"""What a command imports before it needs it: time that everybody waits for, also for one line of an error."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config, write_checkpoint

ENGINES = {"torch", "torch_npu", "torchair", "transformers", "onnx", "onnxruntime"}
# what reads a tokenizer, a chat template or a picture
PROCESSING = {"tokenizers", "jinja2", "PIL"}

RUN = """
import sys
from qwen2vl_tc.exporters.torchair import device
from qwen2vl_tc.toolchain.cli.main import app

def stop(soc):
    sys.exit(3)

if {stopped!r}:
    device.open_device = stop
try:
    app({words!r})
except SystemExit as end:
    print(end.code, *sorted({wanted!r} & set(sys.modules)))
"""


def imported(words: Sequence["str | Path"], code: int, wanted: set[str], stopped: bool = False) -> set[str]:
    """Which of `wanted` a command has imported when it ends with `code`, or where it would open the device with 3."""
    text = RUN.format(words=[str(word) for word in words], wanted=wanted, stopped=stopped)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    ended, *names = done.stdout.splitlines()[-1].split()
    assert ended == str(code), done.stderr
    return set(names)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("imports") / "hf", tiny_config(), dtype="bf16", tokenizer=True)


@pytest.mark.parametrize("command", ["convert", "compile", "build", "verify", "generate"])
def test_help_imports_nothing_that_works(command: str) -> None:
    assert not imported([command, "--help"], 0, {*ENGINES, *PROCESSING, "numpy", "google"})


@pytest.mark.parametrize("command", ["convert", "build"])
def test_a_checkpoint_is_read_and_refused_without_tokenizer_template_or_picture(tmp_path: Path, command: str) -> None:
    source = write_checkpoint(tmp_path / "hf", tiny_config(), dtype="bf16", tokenizer=True)
    (source / "model.safetensors").write_bytes(b"")
    words = [command, "--src", source, "--out", tmp_path / "artifact"]
    assert not imported(words, 2, ENGINES | PROCESSING)


def test_converting_takes_no_engine(source: Path, tmp_path: Path) -> None:
    assert not imported(["convert", "--src", source, "--out", tmp_path / "artifact", "--no-sync"], 0, ENGINES)


def test_compiling_plans_without_an_engine(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    words = ["compile", "--config", tmp_path / "config.json", "--out", tmp_path / "artifact", "--dtype", "bf16"]
    assert not imported(words, 3, ENGINES | PROCESSING, stopped=True)


def test_building_plans_without_an_engine(source: Path, tmp_path: Path) -> None:
    # the tokenizer and the template are read, by the code of a load, before gigabytes are written
    assert not imported(["build", "--src", source, "--out", tmp_path / "artifact"], 3, ENGINES, stopped=True)
