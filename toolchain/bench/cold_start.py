"""`bench cold-start`: from starting a process to its first token, by phase, in fresh processes."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...artifacts.errors import RequestError, ToolchainError
from ...artifacts.manifest import MANIFEST_NAME
from ...artifacts.store import read_manifest, real_path
from ..host.machine import Machine, this_machine, weights_dtype
from . import page_cache
from .bench import BenchOptions, bench_messages

if TYPE_CHECKING:
    from ..progress import StepProgress

WARM, COLD = "warm", "cold"
CLOCK = "from just before the parent starts the process (CLOCK_MONOTONIC) to the child's first token"


@dataclass(frozen=True)
class ColdRun:
    """One process, in milliseconds. resident: the share of the artifact in the page cache when it started.

    phases_ms: start (of the interpreter), imports, manifest, weights, graphs, device, processor, preprocess, visual,
    prefill, weight_check (waiting for hashes that nothing else hid). What lies between them is in first_token_ms alone.
    before_visual_ms: all before the first operator of the visual graph (of prefill, without a picture).
    """

    resident: float
    phases_ms: dict[str, float]
    before_visual_ms: float
    first_token_ms: float


@dataclass(frozen=True)
class ColdStart:
    """What several processes took, and the medians. cache: "warm" or "cold", the page cache's state for the artifact
    (that of libraries is always warm)."""

    artifact: str
    model: str
    dtype: str
    backend: str
    input: str
    cache: str
    clock: str
    phases_ms: dict[str, float]
    before_visual_ms: float
    first_token_ms: float
    runs: tuple[ColdRun, ...]
    versions: dict[str, str]
    machine: Machine


def cold_start(
    path: Path,
    options: BenchOptions,
    progress: "StepProgress",
    backend: str | None = None,
    execute_mode: str | None = None,
    cold: bool = False,
    trusted_keys: Sequence[str | Path] | None = None,
) -> ColdStart:
    """Start `options.runs` processes one after the other, after one that is not counted.

    cold: before each, the artifact is put out of the page cache. Raises what the processes raise, as ToolchainError;
    RequestError for less than one run.
    """
    if options.runs < 1:
        raise RequestError(f"runs is {options.runs}, expected at least 1")
    manifest = read_manifest(path)
    files = [real_path(path) / name for name in (MANIFEST_NAME, *(entry.path for entry in manifest.files()))]
    runs: list[ColdRun] = []
    engine: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        messages, stated = bench_messages(options, Path(folder))
        request = {
            "artifact": str(path),
            "backend": backend,
            "execute_mode": execute_mode,
            "trusted_keys": None if trusted_keys is None else [str(key) for key in trusted_keys],
            "messages": messages,
        }
        # the first brings libraries and byte code into the page cache
        for number in range(options.runs + 1):
            progress("run" if number else "warm-up", number, options.runs + 1)
            (page_cache.drop if cold else page_cache.warm)(files)
            resident = round(page_cache.resident(files), 3)
            told = _first_token(request)
            engine = {name: told.pop(name) for name in ("backend", "device_name", "versions")}
            if number:
                runs.append(ColdRun(resident, **told))
    progress("done", options.runs + 1, options.runs + 1)
    return ColdStart(
        artifact=str(path),
        model=manifest.name,
        dtype=weights_dtype(manifest, engine["backend"]),
        backend=engine["backend"],
        input=stated,
        cache=COLD if cold else WARM,
        clock=CLOCK,
        phases_ms={phase: median(run.phases_ms[phase] for run in runs) for phase in runs[0].phases_ms},
        before_visual_ms=median(run.before_visual_ms for run in runs),
        first_token_ms=median(run.first_token_ms for run in runs),
        runs=tuple(runs),
        versions=engine["versions"],
        machine=this_machine(engine["device_name"]),
    )


def _first_token(request: dict[str, Any]) -> dict[str, Any]:
    """Run one process to its first token; what it says of itself."""
    command = [sys.executable, "-m", "qwen2vl_tc.toolchain.bench.first_token"]
    done = subprocess.run(
        [*command, json.dumps({**request, "begin_ns": time.monotonic_ns()})], capture_output=True, text=True
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode} and said nothing"]
        raise ToolchainError(said[-1])
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def markdown(cold: ColdStart) -> str:
    """A table of the phases' medians, and under it all that they depend on."""
    rows = [("phase", "ms"), ("---", "---:"), *((name, f"{ms:.0f}") for name, ms in cold.phases_ms.items())]
    rows += [
        ("**before the visual graph**", f"**{cold.before_visual_ms:.0f}**"),
        ("**first token**", f"**{cold.first_token_ms:.0f}**"),
    ]
    resident = sorted(run.resident for run in cold.runs)
    return "\n".join(
        [
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            f"- {cold.model}, {cold.dtype}, backend {cold.backend}; {cold.input}",
            f"- {cold.cache} page cache: {resident[0]:.0%} to {resident[-1]:.0%} of the artifact in it at the start; "
            "libraries are in it",
            f"- medians of {len(cold.runs)} processes, {cold.clock}",
            f"- {cold.machine}",
            f"- {', '.join(f'{name} {version}' for name, version in cold.versions.items())}",
        ]
    )
