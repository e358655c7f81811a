"""Any test may `import torch` or `import transformers`, whatever is installed and with no variable set by the user.

Also: artifacts of tiny models, each built once a run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2vl_tc.artifacts.process import prepare_process
from qwen2vl_tc.toolchain.transformers_import import import_transformers

prepare_process()
import_transformers()

Build = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(name, config, dtype=, seed=, batches=, **write_checkpoint's) to (HF folder, artifact); cached by name."""
    from qwen2vl_tc.toolchain.compile import CompileOptions, compile_artifact
    from qwen2vl_tc.toolchain.synthetic import write_checkpoint
    from qwen2vl_tc.toolchain.weights.convert import convert

    made: dict[str, tuple[Path, Path]] = {}

    def make(
        name: str,
        config: dict[str, Any],
        dtype: str = "fp32",
        batches: tuple[int, ...] = (1,),
        max_length: int = 256,
        operators: str = "fused",
        visual_attention: str = "tnd",
        **checkpoint: Any,
    ) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = write_checkpoint(folder / "hf", config, tokenizer=True, **{"dtype": dtype, **checkpoint})
            convert(source, folder / "artifact", dtype, sync=False)
            options = CompileOptions(
                max_length=max_length, batches=batches, operators=operators, visual_attention=visual_attention
            )
            compile_artifact(folder / "artifact", options, sync=False)
            made[name] = (source, folder / "artifact")
        return made[name]

    return make
