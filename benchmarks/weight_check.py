"""What checking the weights costs: cold start with the check and without, at the 2B shape.

    python benchmarks/weight_check.py [--artifact DIR] [--runs 3] [--picture]

Cold start is exec to first token: a fresh process that loads the artifact on CPU and prefills a short text, which is
the least work there is, or a picture. Without --artifact it makes one with random weights first (9 GB of disk).
Also the check's own speed: hashing the mapped weights with nothing beside it, the file cache being warm.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen2vl_tc.artifacts.host.process import prepare_process

COLD_START = """
import sys
import numpy as np
from qwen2vl_tc.runtime import integrity, load
if sys.argv[2] == "without":
    integrity.WeightCheck._run = lambda self: None
model = load(sys.argv[1], "reference")
content = [{"type": "text", "text": "What is this?"}]
if sys.argv[3] == "picture":
    content.insert(0, {"type": "image", "image": np.random.default_rng(0).integers(0, 256, (728, 504, 3), np.uint8)})
answer = model.generate([{"role": "user", "content": content}], max_new_tokens=1, do_sample=False)
print(answer.timings_ms["weight_check"])
"""


def make(folder: Path) -> Path:
    from common import published, write_checkpoint

    from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_artifact
    from qwen2vl_tc.toolchain.weights.convert import convert

    source = write_checkpoint(folder / "2b", published("2b"), tokenizer=True)
    convert(source, folder / "a", sync=False)
    compile_artifact(folder / "a", CompileOptions(max_length=2048), sync=False)
    return folder / "a"


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def cold_start(artifact: Path, how: str, picture: bool) -> tuple[float, float, float]:
    """Of a process that makes one token: seconds from exec to its end, on processors, and waiting for the check."""
    begin, used = time.perf_counter(), cpu_seconds()
    words = (str(artifact), how, "picture" if picture else "text")
    done = subprocess.run([sys.executable, "-c", COLD_START, *words], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, cpu_seconds() - used, json.loads(done.stdout) / 1e3


def measure(artifact: Path, runs: int, picture: bool) -> None:
    from qwen2vl_tc.artifacts.store import open_artifact

    with open_artifact(artifact) as opened:
        files = opened.manifest.weights.files if opened.manifest.weights else ()
        size = sum(entry.bytes for entry in files)
        hashing = []
        for _ in range(runs):
            begin = time.perf_counter()
            for entry in files:
                opened.check(entry)
            hashing.append(time.perf_counter() - begin)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    waits = []
    for _ in range(runs):
        for how, times in seconds.items():
            took, used, waited = cold_start(artifact, how, picture)
            times.append(took)
            cpu[how].append(used)
            if how == "with":
                waits.append(waited)
    checked, plain = (statistics.median(seconds[how]) for how in ("with", "without"))
    busy, plain_busy = (statistics.median(cpu[how]) for how in ("with", "without"))
    own = statistics.median(hashing)
    print(
        f"{size / 1e9:.2f} GB of weights, {'a picture' if picture else 'text alone'}: cold start {checked:.1f} s with "
        f"the check, {plain:.1f} s without ({checked / plain - 1:+.1%}); processor time {busy:.1f} and "
        f"{plain_busy:.1f} s ({busy / plain_busy - 1:+.1%}); waited {statistics.median(waits):.2f} s for it after "
        f"prefill; alone it takes {own:.2f} s, {size / own / 1e9:.1f} GB/s (medians of {runs})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--picture", action="store_true", help="ask about one of 504 x 728, as the other benchmarks do")
    arguments = parser.parse_args()
    prepare_process()
    if arguments.artifact:
        measure(arguments.artifact, arguments.runs, arguments.picture)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(make(Path(folder)), arguments.runs, arguments.picture)


if __name__ == "__main__":
    main()
