"""`bench`: how fast an artifact answers, by the recipe's method.

After warm-up, the first step is ViT and prefill, and decode is what comes after it. End tokens are ignored, so that
every run makes as many tokens as were asked for.
"""

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ...artifacts.errors import RequestError
from ..host.machine import Machine, compute_threads, device_name, engine_versions, on_npu, this_machine, weights_dtype
from ..words import question

if TYPE_CHECKING:
    from ...runtime import Generation, Model
    from ..progress import StepProgress

PROMPT = "Describe this in detail."
DEFAULT_TOKENS = 128
# whatever the checkpoint's generation_config.json says: tokens stay on the device from step to step
_GREEDY: dict[str, Any] = {
    "ignore_eos": True,
    "do_sample": False,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "stop": (),
}
# width and height: 1872 patches, what inspect's costs are given at
DEFAULT_SIZE = (728, 504)


@dataclass(frozen=True)
class BenchOptions:
    """What is asked: `batch` equal requests at once, each with all images and videos (paths).

    Without either, the picture is noise of `size` (width, height). `warmup` runs before `runs` are measured.
    """

    max_new_tokens: int = DEFAULT_TOKENS
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    size: tuple[int, int] = DEFAULT_SIZE
    batch: int = 1
    warmup: int = 1
    runs: int = 3


@dataclass(frozen=True)
class Decode:
    """Milliseconds of a decode step, over all steps of all runs but each run's first; tokens of all rows a second."""

    steps: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    tokens_per_second: float


@dataclass(frozen=True)
class Memory:
    """Peaks in bytes. host: resident, mapped weights included. device: held by torch-npu's allocator; None on CPU."""

    host: int
    device: int | None


@dataclass(frozen=True)
class Bench:
    """One artifact's speed. Times are medians of the runs, in milliseconds; visual and prefill add up all rows.

    first_step_ms: ViT and prefill. dtype: of the weights. threads: on CPU. decode is None where only one token was
    made.
    """

    artifact: str
    model: str
    dtype: str
    backend: str
    execute_mode: str
    device: str
    threads: int | None
    input: str
    batch: int
    patches: int
    prompt_tokens: int
    new_tokens: int
    warmup: int
    runs: int
    preprocess_ms: float
    visual_ms: float
    prefill_ms: float
    first_step_ms: float
    decode: Decode | None
    memory: Memory
    versions: dict[str, str]
    machine: Machine


def bench_messages(options: BenchOptions, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """One request, and what it holds in words. A picture that has to be made is put into `folder`."""
    images = list(options.images)
    stated = [f"picture {Path(path).name}" for path in options.images]
    stated += [f"video {Path(path).name}" for path in options.videos]
    if not stated:
        width, height = options.size
        images = [str(folder / "noise.png")]
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(images[0])
        stated = [f"generated picture of {width} x {height}"]
    return question(PROMPT, images, options.videos), ", ".join(stated)


def bench(model: "Model", options: BenchOptions, progress: "StepProgress") -> Bench:
    """Measure a loaded model.

    Raises RequestError for options that cannot be served, before anything is run.
    """
    for name, least in (("max_new_tokens", 1), ("batch", 1), ("warmup", 0), ("runs", 1)):
        if getattr(options, name) < least:
            raise RequestError(f"{name} is {getattr(options, name)}, expected at least {least}")
    if options.batch > model.backend.max_rows:
        raise RequestError(
            f"batch is {options.batch}, the artifact's largest decode graph takes {model.backend.max_rows}; compile it "
            f"with --batch {options.batch}"
        )
    with TemporaryDirectory() as folder:
        messages, stated = bench_messages(options, Path(folder))
        patches, answers = _answers(model, messages, options, progress)

    def phase(*names: str) -> float:
        return round(median(sum(answer.timings_ms.get(name, 0.0) for name in names) for answer in answers), 3)

    device = _device_peak() if on_npu(model.backend) else None
    return Bench(
        artifact=str(model.artifact.path),
        model=model.manifest.name,
        dtype=weights_dtype(model.manifest, model.backend.name),
        backend=model.backend.name,
        execute_mode="eager" if model.backend.name == "eager" else "dynamo",
        device=model.backend.device,
        threads=compute_threads(model.backend),
        input=stated,
        batch=options.batch,
        patches=patches,
        prompt_tokens=len(answers[0].prompt_token_ids),
        new_tokens=len(answers[0].token_ids),
        warmup=options.warmup,
        runs=options.runs,
        preprocess_ms=phase("preprocess"),
        visual_ms=phase("visual"),
        prefill_ms=phase("prefill"),
        first_step_ms=phase("visual", "prefill"),
        decode=_decode([ms for answer in answers for ms in answer.token_ms], options.batch),
        memory=Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, device),
        versions=engine_versions(model.backend),
        machine=this_machine(device_name(model.backend)),
    )


def _answers(
    model: "Model", messages: list[dict[str, Any]], options: BenchOptions, progress: "StepProgress"
) -> tuple[int, list["Generation"]]:
    """The request's patches, and the first row's answer of each measured run: rows share their timings."""
    patches = len(model.processor.prepare(messages).patches)
    answers = []
    total = options.warmup + options.runs
    for run in range(total):
        progress("warm-up" if run < options.warmup else "measure", run, total)
        answer, *_ = model.generate_batch([messages] * options.batch, max_new_tokens=options.max_new_tokens, **_GREEDY)
        if run >= options.warmup:
            answers.append(answer)
    progress("done", total, total)
    return patches, answers


def _decode(steps_ms: Sequence[float], batch: int) -> Decode | None:
    if not steps_ms:
        return None
    p50, p99 = (round(float(value), 3) for value in np.percentile(steps_ms, (50, 99)))
    mean = fmean(steps_ms)
    return Decode(len(steps_ms), round(mean, 3), p50, p99, round(batch * 1e3 / mean, 3))


def _device_peak() -> int:
    return int(sys.modules["torch_npu"].npu.max_memory_reserved())


def markdown(bench: Bench) -> str:
    """The recipe's table, and under it all that its figures depend on."""
    decode, memory = bench.decode, bench.memory
    columns = {
        "execute mode": bench.execute_mode,
        "ViT+prefill (ms)": f"{bench.first_step_ms:.1f}",
        "of it ViT": f"{bench.visual_ms:.1f}",
        "decode mean (ms)": f"{decode.mean_ms:.2f}" if decode else "-",
        "p50": f"{decode.p50_ms:.2f}" if decode else "-",
        "p99": f"{decode.p99_ms:.2f}" if decode else "-",
        "tokens/s": f"{decode.tokens_per_second:.1f}" if decode else "-",
        "peak host memory (GB)": f"{memory.host / 1e9:.2f}",
    }
    if memory.device is not None:
        columns["peak device memory (GB)"] = f"{memory.device / 1e9:.2f}"
    lines = [_row(columns), _row("---" if i == 0 else "---:" for i in range(len(columns))), _row(columns.values())]
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    return "\n".join(
        [
            *lines,
            "",
            f"- {bench.model}, {bench.dtype}, backend {bench.backend} on {bench.device}"
            f"{f' with {bench.threads} threads' if bench.threads else ''}, batch {bench.batch}",
            f"- {bench.input}: {bench.patches} patches, {bench.prompt_tokens} prompt tokens; {bench.new_tokens} new "
            "tokens a row, end tokens ignored",
            f"- {bench.warmup} warm-up run(s), then {bench.runs}: medians of the first step, decode over "
            f"{decode.steps if decode else 0} steps",
            f"- {bench.machine}",
            f"- {versions}",
        ]
    )


def _row(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"
