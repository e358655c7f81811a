"""Operators of the GE graphs at a published shape, and whether CANN's releases would take every node.

    python benchmarks/operators.py [--family qwen2_vl|qwen2_5_vl] [--size 7b]

Compiles the graphs from config.json alone into a temporary folder, through the command line: a minute, no weights. The
counts are the same on every machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SHAPES

COMMAND = (sys.executable, "-m", "qwen2vl_tc")


def asked(*words: str | Path) -> dict[str, Any]:
    """What a command says with --json. Ends with its words where it fails."""
    done = subprocess.run([*COMMAND, *map(str, words), "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_vl", choices=tuple(SHAPES))
    parser.add_argument("--size", default="7b")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config, artifact = Path(folder, "config.json"), Path(folder, "artifact")
        config.write_text(json.dumps(SHAPES[options.family](options.size)))
        made = subprocess.run([*COMMAND, "compile", "--config", config, "--out", artifact], capture_output=True)
        if made.returncode:
            raise SystemExit(made.stderr.decode())
        inspected, checked = asked("inspect", artifact), asked("check", artifact)
    for name, graph in inspected["graphs"].items():
        ops, added = graph["ops"], graph["inserted"]
        layer = f" ({ops['per_layer']} a layer)" if ops["per_layer"] else ""
        print(
            f"{name}: {ops['device']} device operators{layer}, "
            f"{'unknown' if added is None else sum(added.values())} inserted by CANN, "
            f"{ops['transpose_weight']} weight transposes, {ops['shape']} of shape arithmetic"
        )
    print(f"every node taken by CANN {', '.join(checked['admitted'])}")


if __name__ == "__main__":
    main()
