"""Time `convert`, hashing included, against `cp -r` of the same bytes. Run by hand:

    python benchmarks/convert.py                     # 2B shape, 4.4 GB, needs 9 GB of disk and of memory for the caches
    python benchmarks/convert.py --config config.json --folder /scratch

Both write from warm caches and neither waits for the disk; they take turns, each in a fresh process, so that whatever
else the machine does hits both alike. Ends with exit code 1 if the ratio of the medians is above the goal.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from common import published, write_checkpoint

GOAL = 1.6
CONVERT = (
    "import sys; from pathlib import Path; from qwen2vl_tc.toolchain.weights.convert import convert; "
    "convert(Path(sys.argv[1]), Path(sys.argv[2]), sync=False)"
)


def _seconds(command: list[str], made: Path) -> float:
    """Wall time of one process from start to end. What it made is deleted, so that dirty pages are never written."""
    start = time.perf_counter()
    subprocess.run(command, check=True)
    elapsed = time.perf_counter() - start
    shutil.rmtree(made)
    return elapsed


def _warm(folder: Path) -> int:
    """Read every file once; returns the bytes."""
    total = 0
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while count := len(file.read(16 << 20)):
                total += count
    return total


def main(
    config: Annotated[Path | None, typer.Option(help="A config.json; default: the published 2B shape.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to work; default: the temporary folder.")] = None,
    rounds: Annotated[int, typer.Option(help="How often each side runs.")] = 5,
) -> None:
    shape = json.loads(config.read_text()) if config else published("2b")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, copy, artifact = (Path(work, name) for name in ("hf", "copy", "artifact"))
        write_checkpoint(source, shape, shards=2, tokenizer=True)
        total = _warm(source)
        # written back before the clock starts: otherwise the first rounds share the disk with it
        os.sync()
        commands = {
            "cp": (["cp", "-r", str(source), str(copy)], copy),
            "convert": ([sys.executable, "-c", CONVERT, str(source), str(artifact)], artifact),
        }
        for name, (command, _) in commands.items():
            print(f"{name}: {shlex.join(command)}")
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(rounds):
            for name, (command, made) in commands.items():
                times[name].append(_seconds(command, made))
            print(f"round {number + 1}: " + ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items()))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name}: median {median:.2f} s, {total / median / 1e9:.2f} GB/s of {total / 1e9:.2f} GB")
    ratio = medians["convert"] / medians["cp"]
    print(f"convert / cp: {ratio:.2f}, goal at most {GOAL}")
    if ratio > GOAL:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
