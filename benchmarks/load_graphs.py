"""How long the three graphs of an artifact take to load, checks and bindings included, without weights.

    python benchmarks/load_graphs.py [--size 7b] [--runs 20]

Compiles the graphs of a published shape into a temporary folder first (half a minute), then times, in one process and
after all imports: opening the artifact, hashing and parsing every graph and binding, resolving every operator.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from qwen2vl_tc.artifacts.host.process import prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", choices=("2b", "7b", "72b"))
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    prepare_process()
    from common import published

    from qwen2vl_tc.artifacts.store import open_artifact
    from qwen2vl_tc.runtime.backends.reference import ReferenceBackend
    from qwen2vl_tc.toolchain.build.compile import CompileOptions, compile_config

    with tempfile.TemporaryDirectory() as folder:
        config, artifact = Path(folder, "config.json"), Path(folder, "artifact")
        config.write_text(json.dumps(published(arguments.size)))
        compile_config(config, artifact, CompileOptions(), sync=False)
        times_ms = []
        for _ in range(arguments.runs):
            begin = time.perf_counter()
            with open_artifact(artifact) as opened:
                ReferenceBackend(opened)
            times_ms.append((time.perf_counter() - begin) * 1e3)
    times_ms.sort()
    print(
        f"{arguments.size}: three graphs loaded in {statistics.median(times_ms):.0f} ms "
        f"(median of {arguments.runs}; {times_ms[0]:.0f} to {times_ms[-1]:.0f})"
    )


if __name__ == "__main__":
    main()
