"""The commands that measure: bench, and bench cold-start."""

import dataclasses
import re
from typing import Annotated

import typer

from ...artifacts.errors import RequestError
from .asking import GivenEngine, GivenPictures
from .options import Artifact, Json

BENCH_EXAMPLES = (
    "qwen2vl-tc bench qwen2-vl-7b.artifact",
    "qwen2vl-tc bench qwen2-vl-7b.artifact --execute-mode eager --max-new-tokens 128 --image cat.jpg",
    "qwen2vl-tc bench qwen2-vl-7b.artifact --batch 4 --warmup 2 --runs 10 --json",
)
COLD_START_EXAMPLES = (
    "qwen2vl-tc bench cold-start qwen2-vl-7b.artifact --json",
    "qwen2vl-tc bench cold-start qwen2-vl-7b.artifact --cold --runs 5",
)

Size = Annotated[
    str, typer.Option("--size", metavar="WxH", help="Without --image and --video: pixels of a generated picture.")
]
Runs = Annotated[int, typer.Option("--runs", metavar="N", help="Measured runs.")]


def bench(
    artifact: Artifact,
    *,
    pictures: GivenPictures,
    size: Size = "728x504",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", help="Tokens of every answer; end tokens are ignored.")
    ] = 128,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Equal requests, answered together.")] = 1,
    warmup: Annotated[int, typer.Option("--warmup", metavar="N", help="Runs before those that are measured.")] = 1,
    runs: Runs = 3,
    engine: GivenEngine,
    as_json: Json = False,
) -> None:
    """Measure ViT+prefill, decode and memory; prints a Markdown table with all that its figures depend on.

    `qwen2vl-tc bench cold-start ARTIFACT` measures loading.
    """
    from ..bench.bench import BenchOptions, markdown
    from ..bench.bench import bench as bench_model
    from .console import result, result_json, step_progress

    images, videos = tuple(pictures.images), tuple(pictures.videos)
    options = BenchOptions(max_new_tokens, images, videos, _size(size), batch, warmup, runs)
    model = engine.load(artifact)
    with step_progress("bench") as progress:
        measured = bench_model(model, options, progress)
    if as_json:
        result_json(dataclasses.asdict(measured))
    else:
        result(markdown(measured))


def cold_start(
    artifact: Artifact,
    *,
    pictures: GivenPictures,
    size: Size = "728x504",
    cold: Annotated[
        bool, typer.Option("--cold", help="Put the artifact out of the page cache before each run, not into it.")
    ] = False,
    runs: Runs = 3,
    engine: GivenEngine,
    as_json: Json = False,
) -> None:
    """Measure, by phase, what passes between starting a process and its first token.

    Each run is a process of its own; the first is not counted.
    """
    from ..bench.bench import BenchOptions
    from ..bench.cold_start import cold_start as measure
    from ..bench.cold_start import markdown
    from .console import result, result_json, step_progress

    images, videos = tuple(pictures.images), tuple(pictures.videos)
    options = BenchOptions(images=images, videos=videos, size=_size(size), runs=runs)
    with step_progress("cold-start") as progress:
        measured = measure(artifact, options, progress, engine.backend, engine.execute_mode, cold, engine.trusted_keys)
    if as_json:
        result_json(dataclasses.asdict(measured))
    else:
        result(markdown(measured))


def _size(text: str) -> tuple[int, int]:
    """`728x504` to (728, 504)."""
    from ...runtime.pictures.images import check_area

    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise RequestError(f"--size {text}: expected width and height in pixels, such as 728x504")
    width, height = int(match[1]), int(match[2])
    check_area(f"--size {text}", width, height)
    return width, height
