"""Feeds mutated artifacts to a process of their own, with a limit on its memory and on the time for each.

`make fuzz RUNS=5000` mutates the artifact of tests/data, then a tiny one with ONNX models, each twice: with the hashes
as they were, and with the manifest naming the new ones, so that the parsers are reached. `--artifact DIR` takes another
artifact instead. At last the command line is given options, files and streams of every kind (fuzz.edges).
"""

import argparse
import json
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from helpers.onnx_artifact import onnx_artifact
from helpers.released import unpack

from fuzz import edges
from fuzz.mutations import mutate
from qwen2vl_tc.artifacts.integrity import hash_bytes

TESTS = Path(__file__).parents[1]
SECONDS = 5.0
MANIFEST = "manifest.json"


class Sandbox:
    """A worker that is started again whenever an artifact has ended it."""

    def __init__(self, clean: Path) -> None:
        self._clean = clean
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "QWEN2VL_TC_THREADS": "1", "PYTHONPATH": str(TESTS)}
        process = subprocess.Popen(
            [sys.executable, "-m", "fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self._process = process
        ready = self._ask(process, self._clean, 120.0)
        if ready is None or ready["outcome"] != "ready":
            raise RuntimeError(f"the clean artifact does not load: {ready}")
        return process

    def _ask(self, process: "subprocess.Popen[str]", path: Path, seconds: float) -> dict[str, str] | None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        # poll, not select: that takes no descriptor above 1023
        poller = select.poll()
        poller.register(process.stdout, select.POLLIN)
        if not poller.poll(seconds * 1000):
            return None
        line = process.stdout.readline()
        return dict(json.loads(line)) if line else {"outcome": "failed", "message": f"died: {process.wait()}"}

    def run(self, path: Path) -> dict[str, str]:
        """What came of one artifact: outcome refused, same, different or failed, and a message."""
        alive = self._process is not None and self._process.poll() is None
        process = self._process if alive and self._process else self._start()
        answer = self._ask(process, path, SECONDS)
        if answer is None:
            answer = {"outcome": "failed", "message": f"hangs: no answer after {SECONDS} s"}
        if process.poll() is not None or answer["message"].startswith(("hangs", "memory", "died")):
            self.close()
        return answer

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class Report:
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def variant(clean: Path, folder: Path, changes: dict[str, bytes], restamp: bool) -> Path:
    """A copy of an artifact, as links, with some files replaced; `restamp` lets the manifest vouch for them."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(clean, folder, copy_function=os.link)
    changes = dict(changes)
    if restamp and MANIFEST not in changes:
        text = (clean / MANIFEST).read_text(encoding="utf-8")
        for path, data in changes.items():
            before = (clean / path).read_bytes()
            old = f'"path": {json.dumps(path)},\n{{0}}"bytes": {len(before)},\n{{0}}"hash": "{hash_bytes(before)}"'
            new = f'"path": {json.dumps(path)},\n{{0}}"bytes": {len(data)},\n{{0}}"hash": "{hash_bytes(data)}"'
            for spaces in range(1, 8):
                text = text.replace(old.format(" " * spaces), new.format(" " * spaces))
        changes[MANIFEST] = text.encode()
    for path, data in changes.items():
        (folder / path).unlink()
        (folder / path).write_bytes(data)
    return folder


def splice(before: bytes, after: bytes) -> list[object]:
    """The shortest [offset, bytes removed, bytes inserted as hex] that makes one of the other."""
    begin = 0
    shorter = min(len(before), len(after))
    while begin < shorter and before[begin] == after[begin]:
        begin += 1
    end = 0
    while end < shorter - begin and before[-1 - end] == after[-1 - end]:
        end += 1
    return [begin, len(before) - end - begin, after[begin : len(after) - end].hex()]


def unsplice(before: bytes, change: list[object]) -> bytes:
    """The file that `splice` compared `before` with."""
    offset, removed, inserted = change
    if not (isinstance(offset, int) and isinstance(removed, int) and isinstance(inserted, str)):
        raise ValueError(f"not a splice: {change}")
    return before[:offset] + bytes.fromhex(inserted) + before[offset + removed :]


def judge(path: str, answer: dict[str, str], restamped: bool) -> str | None:
    """What is wrong with this outcome, or None."""
    if answer["outcome"] == "failed":
        return answer["message"]
    if answer["outcome"] == "different" and not restamped:
        return "another answer, and no error"
    if answer["outcome"] == "refused" and not restamped and path not in answer["message"] and path != MANIFEST:
        return f"the error does not name the file: {answer['message']}"
    return None


def fuzz(clean: Path, work: Path, runs: int, seed: int, restamp: bool, corpus: list[object] | None = None) -> Report:
    """`runs` mutations, evenly over all files of the artifact. What fails is added to `corpus` as a splice."""
    report = Report()
    files = sorted(p.relative_to(clean).as_posix() for p in clean.rglob("*") if p.is_file())
    with Sandbox(clean) as sandbox:
        for number in range(runs):
            rng = random.Random(f"{seed} {number} {restamp}")
            path = files[number % len(files)]
            before = (clean / path).read_bytes()
            after = mutate(path, before, rng)
            changed = variant(clean, work, {path: after}, restamp)
            answer = sandbox.run(changed)
            if answer["message"].startswith("hangs"):
                answer = sandbox.run(changed)  # a machine may stall; a file that hangs hangs again
            report.outcomes[answer["outcome"]] += 1
            problem = judge(path, answer, restamp)
            if problem is not None:
                report.failures.append(f"{path}, seed {seed}, number {number}, restamp {restamp}: {problem}")
                if corpus is not None:
                    corpus.append({"path": path, "restamp": restamp, "splice": splice(before, after)})
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5000, help="mutations, each of them tried both ways")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--artifact", type=Path, help="default: the one in tests/data, and one with ONNX models")
    parser.add_argument("--corpus", type=Path, help="write what fails to this file")
    arguments = parser.parse_args()
    failed = 0
    corpus: list[object] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.artifact:
            artifacts = [Path(shutil.copytree(arguments.artifact, folder / "clean"))]
        else:
            artifacts = [unpack(folder / "schema-1"), onnx_artifact(folder / "onnx")]
        for clean in artifacts:
            for restamp in (False, True):
                begin = time.monotonic()
                report = fuzz(clean, folder / "variant", arguments.runs, arguments.seed, restamp, corpus)
                failed += len(report.failures)
                how = f"{clean.name}, {'hashes renewed' if restamp else 'hashes as they were'}"
                counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items()))
                seconds = time.monotonic() - begin
                print(f"{how}: {arguments.runs} mutations, {len(report.failures)} failures ({counts}), {seconds:.0f} s")
                for failure in report.failures:
                    print(f"  {failure}")
        if not arguments.artifact:
            begin = time.monotonic()
            # a process each: a tenth of the runs takes as long as the rest
            lines = max(1, arguments.runs // 10)
            problems = edges.fuzz(folder / "onnx", folder / "edges", lines, arguments.seed)
            failed += len(problems)
            print(f"command lines: {lines}, {len(problems)} failures, {time.monotonic() - begin:.0f} s")
            for problem in problems:
                print(f"  {problem}")
    if arguments.corpus:
        arguments.corpus.write_text(json.dumps(corpus, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
