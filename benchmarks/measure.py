"""Print the figures of docs/MEASURED.md anew, as rows of its table. `make measure` runs it, or by hand:

    python benchmarks/measure.py              # those that take seconds to two minutes each on a quiet machine
    python benchmarks/measure.py --all        # also those that take many minutes, 20 GB of disk and of memory
    python benchmarks/measure.py load_graphs  # only the ones named
    python benchmarks/measure.py --list       # which there are, and their commands

A figure is what its command prints of it, with the machine, how busy it was, and the date. Ends with exit code 1 if a
command fails, which those with a goal also do when they miss it.
"""

import argparse
import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """A figure: what is measured, the command that prints it, and a pattern of the lines that state it."""

    name: str
    what: str
    command: str
    lines: str
    slow: bool = False


ROWS = (
    Row(
        "operators",
        "operators of the graphs at Qwen2-VL 7B, and who takes them",
        "python benchmarks/operators.py --size 7b",
        ".",
    ),
    Row(
        "operators_2_5",
        "operators of the graphs at Qwen2.5-VL 7B, and who takes them",
        "python benchmarks/operators.py --family qwen2_5_vl --size 7b",
        ".",
    ),
    Row("load_graphs", "three 7B graphs loaded, hashed, bound", "python benchmarks/load_graphs.py", "loaded in"),
    Row(
        "vision",
        "a picture, and a clip, to patches, over transformers' PIL processor behind a full decode",
        "python benchmarks/vision.py",
        "times$",
    ),
    Row(
        "cold_start_small",
        "start to first token with a picture at 2B's widths and two layers a tower, over transformers, bf16",
        "python benchmarks/cold_start.py --layers 2 --dtype bf16",
        "^bf16 [a-z]+_.*ratio",
    ),
    Row(
        "convert",
        "converting a 2B checkpoint, hashing included, over `cp`",
        "python benchmarks/convert.py",
        "^convert / cp",
        slow=True,
    ),
    Row(
        "cold_start",
        "start to first token at the whole 2B shape, bf16 and fp32",
        "python benchmarks/cold_start.py",
        "ratio",
        slow=True,
    ),
    Row(
        "weight_check",
        "what checking every byte of the weights adds to a cold start at the 2B shape",
        "python benchmarks/weight_check.py --picture",
        "cold start",
        slow=True,
    ),
    Row(
        "onnx_speed",
        "ONNX models at the 2B shape over transformers in fp32",
        "python benchmarks/onnx_speed.py",
        r"^\||times",
        slow=True,
    ),
    Row("soak", "a thousand requests: memory and latency", "python benchmarks/soak.py", "requests:", slow=True),
    Row(
        "demo_model",
        "right answers of the demo model about 200 scenes that training never shows",
        "python -m scripts.demo_model evaluate",
        ".",
        slow=True,
    ),
)


def measured(row: Row) -> tuple[str, bool]:
    """Run a row's command in the checkout. Returns what it said of the figure, and whether it succeeded."""
    words = shlex.split(row.command)
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=environment, capture_output=True, text=True)
    stated = [" ".join(line.split()) for line in done.stdout.splitlines() if re.search(row.lines, line)]
    if done.returncode:
        print(f"{row.command}: exit code {done.returncode}\n{done.stderr.strip()}", file=sys.stderr)
    return "; ".join(stated), not done.returncode


def markdown(row: Row, figure: str) -> str:
    machine = f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, load {os.getloadavg()[0]:.1f}"
    cells = (f"`{row.name}`", row.what, figure.replace("|", "/"), f"`{row.command}`")
    return f"| {' | '.join(cells)} | {machine}, {datetime.date.today()} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="the figures to measure")
    parser.add_argument("--all", action="store_true", help="also the slow ones")
    parser.add_argument("--list", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if unknown := set(options.names) - {row.name for row in ROWS}:
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(row.name for row in ROWS)}")
    quick = tuple(row.name for row in ROWS if options.all or not row.slow)
    chosen = [row for row in ROWS if row.name in (options.names or quick)]
    if options.list:
        for row in ROWS:
            print(f"{row.name}\t{'slow' if row.slow else 'quick'}\t{row.command}")
        return
    failed = False
    print("| | what | measured | command | machine, date |\n|---|---|---|---|---|", flush=True)
    for row in chosen:
        figure, succeeded = measured(row)
        failed |= not succeeded
        print(markdown(row, figure if succeeded else f"{figure} (failed)".strip()), flush=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
