"""What checking the weights costs: cold start with the check and without, at the 2B shape.

    python benchmarks/weight_check.py [--artifact DIR] [--runs 3]

Cold start is exec to first token: a fresh process that loads the artifact on CPU and prefills a short text, which is
less work than any picture. Without --artifact it makes one with random weights first (9 GB of disk, two minutes).
Also the check's own speed: hashing the mapped weights with nothing beside it, the file cache being warm.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qwen2vl_tc.artifacts.process import prepare_process

COLD_START = """
import sys
from qwen2vl_tc.runtime import integrity, load
if sys.argv[2] == "without":
    integrity.WeightCheck._run = lambda self: None
model = load(sys.argv[1], "reference")
answer = model.generate([{"role": "user", "content": "Hello"}], max_new_tokens=1, do_sample=False)
print(answer.timings_ms["weight_check"])
"""


def make(folder: Path) -> Path:
    from qwen2vl_tc.toolchain.compile import CompileOptions, compile_artifact
    from qwen2vl_tc.toolchain.synthetic import published, write_checkpoint
    from qwen2vl_tc.toolchain.weights.convert import convert

    source = write_checkpoint(folder / "2b", published("2b"), tokenizer=True)
    convert(source, folder / "a", sync=False)
    compile_artifact(folder / "a", CompileOptions(max_length=2048), sync=False)
    return folder / "a"


def cold_start(artifact: Path, how: str) -> tuple[float, float]:
    """Seconds from exec to the end of a process that made one token; and how long that waited for the check."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COLD_START, str(artifact), how], capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, json.loads(done.stdout) / 1e3


def measure(artifact: Path, runs: int) -> None:
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
    waits = []
    for _ in range(runs):
        for how, found in seconds.items():
            took, waited = cold_start(artifact, how)
            found.append(took)
            if how == "with":
                waits.append(waited)
    checked, plain = (statistics.median(seconds[how]) for how in ("with", "without"))
    own = statistics.median(hashing)
    print(
        f"{size / 1e9:.2f} GB of weights: cold start {checked:.1f} s with the check, {plain:.1f} s without "
        f"({checked / plain - 1:+.1%}); waited {statistics.median(waits):.2f} s for it after prefill; alone it takes "
        f"{own:.2f} s, {size / own / 1e9:.1f} GB/s (medians of {runs})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    prepare_process()
    if arguments.artifact:
        measure(arguments.artifact, arguments.runs)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(make(Path(folder)), arguments.runs)


if __name__ == "__main__":
    main()
