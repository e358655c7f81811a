"""A picture's embeddings do not depend on what else is asked about, on any backend that runs segments as a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.synthetic import tiny_config
from typer.testing import CliRunner

from qwen2vl_tc.runtime import load
from qwen2vl_tc.runtime.models.positions import segment_ends
from qwen2vl_tc.runtime.models.segments import plan_runs
from qwen2vl_tc.toolchain.cli.main import app

# t, h, w: three sizes, of which two are near enough to be padded together, one that comes again, and a clip
GRIDS = [(1, 8, 8), (1, 4, 4), (1, 8, 10), (3, 4, 4), (1, 8, 8), (1, 12, 18), (1, 8, 10)]
# products over other numbers of rows are summed in another order
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def artifact(build: Any) -> Path:
    _, path = build("segments", tiny_config(), max_length=64)
    words = ["compile", str(path), "--mode", "onnx", "--weights", "fp32", "--max-length", "64"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert isinstance(path, Path)
    return path


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_a_picture_alone_and_among_others_has_the_same_embeddings(artifact: Path, backend: str) -> None:
    rng = np.random.default_rng(5)
    sizes = [t * h * w for t, h, w in GRIDS]
    patches = [rng.integers(0, 256, (size, 1176), dtype=np.uint8) for size in sizes]

    with load(artifact, backend) as model:

        def embeds(chosen: list[int]) -> list[np.ndarray]:
            """Of each chosen picture, asked about together."""
            grids = np.array([GRIDS[i] for i in chosen])
            given = np.concatenate([patches[i] for i in chosen])
            made = model.backend.embed(model.processor.inputs, given, grids)
            tensor = made.tensor
            assert len(tensor) == made.count == len(given) // 4, "no row of padding is handed on"
            return np.split(np.asarray(tensor), np.cumsum([sizes[i] // 4 for i in chosen])[:-1])

        alone = [embeds([i])[0] for i in range(len(GRIDS))]
        for chosen in ([*range(len(GRIDS))], [2, 0], [6, 5, 4, 3, 2, 1, 0], [0, 4], [3, 1]):
            for i, found in zip(chosen, embeds(chosen), strict=True):
                np.testing.assert_allclose(found, alone[i], atol=TOLERANCE, rtol=0)


def test_the_pictures_above_are_grouped_in_every_way() -> None:
    ends = segment_ends(np.array(GRIDS))
    padded, exact = plan_runs(ends, 1 << 16, pads=True), plan_runs(ends, 1 << 16, pads=False)
    assert any(len(set(run.lengths)) > 1 for run in padded), "some are padded"
    assert len(padded) < len(exact) < len(ends)
    assert any(np.ptp(run.segments) >= len(run.segments) for run in exact), "some stand apart"
