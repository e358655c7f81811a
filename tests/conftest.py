"""Any test may `import torch` or `import transformers`, whatever is installed and with no variable set by the user.

Also: artifacts of tiny models, each built once a run.
"""

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_tc.artifacts.host.process import prepare_process
from qwen2vl_tc.toolchain.verify.transformers_import import import_transformers

prepare_process()
# a shell's background jobs ignore it, and would hand that down to what the tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
# tiny tensors: several threads only wait for each other, ten times as long on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `make newest` runs what needs no torch without it
if importlib.util.find_spec("torch") is not None:
    import_transformers()

Build = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(name, config, dtype=, ..., **write_checkpoint's) to (HF folder, artifact), made by the commands; cached."""
    from helpers.synthetic import write_checkpoint
    from typer.testing import CliRunner

    from qwen2vl_tc.toolchain.cli.main import app

    made: dict[str, tuple[Path, Path]] = {}

    def run(*words: str | int | Path) -> None:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output

    def make(
        name: str,
        config: dict[str, Any],
        dtype: str = "fp32",
        batches: str = "1",
        max_length: int = 256,
        operators: str = "fused",
        visual_attention: str = "segments",
        **checkpoint: Any,
    ) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = write_checkpoint(folder / "hf", config, tokenizer=True, **{"dtype": dtype, **checkpoint})
            artifact = folder / "artifact"
            run("convert", "--src", source, "--out", artifact, "--dtype", dtype, "--no-sync")
            forms = ("--operators", operators, "--visual-attention", visual_attention)
            run("compile", artifact, "--max-length", max_length, "--batch", batches, *forms)
            made[name] = (source, artifact)
        return made[name]

    return make
