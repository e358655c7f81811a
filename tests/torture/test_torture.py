"""A small share of `make torture`, which kills 300 times."""

import os
import subprocess
import sys
from pathlib import Path


def test_killed_starved_and_racing_commands_lose_nothing() -> None:
    words = ("--runs", "12", "--disk", "4", "--races", "2", "--seed", "7")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "torture.runner", *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    # 8 kills of convert, 3 of compile, 1 of build, 4 full disks, 5 read-only targets, 3 read-only artifacts, 20 links,
    # 2 races of each kind
    assert done.stdout.splitlines()[-1] == "48 runs, 0 failures, seed 7"
