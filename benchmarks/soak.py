"""A thousand requests of mixed size through one loaded runtime: does it grow, does it slow down?

    python benchmarks/soak.py [--artifact DIR] [--requests 1000]

Without --artifact it builds a tiny model first. Ten kinds of request take turns: short and long texts, one picture of
three sizes, two pictures, a clip, sampled and greedy answers, batches where the artifact has a decode graph for two.
Exit code 1 if resident memory at the end is more than 5% above that after the tenth request, or the median latency of
the last 100 more than 15% above that of requests 10 to 110.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qwen2vl_tc.artifacts.host.process import prepare_process

WARM_UP, WINDOW = 10, 100
MEMORY_GROWTH, LATENCY_GROWTH = 1.05, 1.15


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def picture(rows: int, columns: int) -> Any:
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack([y % 256, x % 256, (x + y) % 256], -1).astype(np.uint8)


def ask(text: str, **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*({"type": kind, kind: data} for kind, data in more.items()), text_part(text)]}
    ]


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def kinds(model: Any) -> list[Callable[[], Any]]:
    """Ten requests, each a call."""
    frames = [picture(56, 56)] * 4
    two = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, text_part("Which?")]}]
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 1}
    pair = [ask("One."), ask("Another one, longer.")]

    def batch() -> Any:
        if model.backend.max_rows >= 2:
            return model.generate_batch(pair, max_new_tokens=8)
        return model.generate(pair[1], max_new_tokens=8)

    return [
        lambda: model.generate(ask("Hi"), max_new_tokens=4),
        lambda: model.generate(ask("word " * 20), max_new_tokens=16),
        lambda: model.generate(ask("What?", image=picture(56, 56)), max_new_tokens=4),
        lambda: model.generate(ask("What?", image=picture(112, 140)), max_new_tokens=8),
        lambda: model.generate(ask("What?", image=picture(200, 90)), max_new_tokens=12),
        lambda: model.generate(two, [picture(56, 84), picture(84, 56)], max_new_tokens=4),
        lambda: model.generate(ask("What?", video=frames), max_new_tokens=4),
        lambda: model.generate(ask("Hi"), max_new_tokens=16, **sampled),
        lambda: model.generate(ask("What?", image=picture(84, 84)), max_new_tokens=8, **sampled),
        batch,
    ]


def build_tiny(folder: Path) -> Path:
    from common import tiny_config, write_checkpoint

    from qwen2vl_tc.toolchain.build.build import build
    from qwen2vl_tc.toolchain.build.compile import CompileOptions

    source = write_checkpoint(folder / "tiny", tiny_config(), dtype="fp32", tokenizer=True)
    build(source, folder / "a", options=CompileOptions(max_length=1024, batches=(1, 2)), verify=False, sync=False)
    return folder / "a"


def soak(artifact: Path, requests: int) -> int:
    from qwen2vl_tc.runtime import load

    model = load(artifact)
    seconds: list[float] = []
    memory = 0
    for number, request in zip(range(1, requests + 1), itertools.cycle(kinds(model)), strict=False):
        begin = time.perf_counter()
        request()
        seconds.append(time.perf_counter() - begin)
        if number == WARM_UP:
            memory = resident_bytes()
    grown = resident_bytes() / memory
    early = statistics.median(seconds[WARM_UP : WARM_UP + WINDOW])
    slowed = statistics.median(seconds[-WINDOW:]) / early
    print(
        f"{requests} requests: memory {memory / 1e6:.0f} MB after {WARM_UP}, {grown:.3f} of it at the end; median "
        f"latency {early * 1e3:.1f} ms, {slowed:.2f} of it for the last {WINDOW}"
    )
    return 0 if grown <= MEMORY_GROWTH and slowed <= LATENCY_GROWTH else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--requests", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.requests < WARM_UP + WINDOW:
        parser.error(f"--requests: at least {WARM_UP + WINDOW}")
    prepare_process()
    if arguments.artifact:
        return soak(arguments.artifact, arguments.requests)
    with tempfile.TemporaryDirectory() as folder:
        return soak(build_tiny(Path(folder)), arguments.requests)


if __name__ == "__main__":
    sys.exit(main())
