"""The command line as a user calls it, and one artifact that it built with everything: convert, compile, verify."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.synthetic import tiny_config, write_checkpoint
from typer.testing import CliRunner, Result

from qwen2vl_tc.toolchain.cli.main import app
from qwen2vl_tc.toolchain.demo.demo import SCENE
from qwen2vl_tc.toolchain.demo.pictures import draw

Run = Callable[..., Result]
TINY = tiny_config()


def run_app(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="session")
def run() -> Run:
    """run("inspect", path, ...) to a result with exit_code, stdout and stderr."""
    return run_app


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny fp32 checkpoint with a tokenizer."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny", TINY, dtype="fp32", tokenizer=True)


@pytest.fixture(scope="session")
def build_result(checkpoint: Path) -> Result:
    """What `build` printed when it made `built`."""
    out = checkpoint.parent / "built.artifact"
    return run_app("build", "--src", checkpoint, "--out", out, "--max-length", "256", "--batch", "1,2", "--no-sync")


@pytest.fixture(scope="session")
def built(checkpoint: Path, build_result: Result) -> Path:
    """A verified artifact of `checkpoint`, for batches 1 and 2. Tests do not change it."""
    assert build_result.exit_code == 0, build_result.output
    return checkpoint.parent / "built.artifact"


@pytest.fixture(scope="session")
def picture(checkpoint: Path) -> Path:
    path = checkpoint.parent / "shapes.png"
    draw(SCENE)[0].save(path)
    return path
