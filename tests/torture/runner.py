"""Kills, starves and races the commands that write artifacts, and says what came of it.

`make torture` kills convert, compile and build 300 times in all, fills the disk 50 times, and has builds compete with
each other and with a runtime. After each: the artifact is the old one or the new one, whole; the command runs again to
its end; nothing stays beside the artifact; its bytes are those of an undisturbed run.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from helpers.synthetic import tiny_config, write_checkpoint

from qwen2vl_tc.artifacts.errors import ToolchainError
from qwen2vl_tc.artifacts.host.process import prepare_process
from qwen2vl_tc.artifacts.store import open_artifact
from torture.children import NONE, Ending, Trouble, command, finish, killings, remember_traces, run, start

Tree = dict[str, bytes]
_SHARES = {"convert": 200, "compile": 80, "build": 20}
_QUESTION = [{"role": "user", "content": "Say something."}]


def tree(folder: Path) -> Tree:
    """Every file's bytes, by its path."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class Tally:
    """Runs and failures of one kind of trouble."""

    name: str
    runs: int = 0
    failures: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1

    def line(self) -> str:
        more = "".join(f", {count} {what}" for what, count in sorted(self.notes.items()))
        return f"{self.name}: {self.runs} runs, {len(self.failures)} failures{more}"


@dataclass(frozen=True)
class Job:
    """One command, what stands at its target before, and what an undisturbed run leaves there."""

    name: str
    words: Callable[[Path], list["str | Path"]]
    old: Path | None
    new: Tree
    whole: Ending

    def work(self, target: Path) -> Callable[[], None]:
        return command(self.words(target))


class Workshop:
    """Two checkpoints, and the artifacts that the commands start from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        small = {"depth": 1, "embed_dim": 16, "mlp_ratio": 2, "num_heads": 2}
        config = tiny_config(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
            vision=small,
        )  # fmt: skip
        self.sources = [
            write_checkpoint(folder / f"tiny{seed}", config, dtype="fp32", tokenizer=True, seed=seed) for seed in (0, 1)
        ]
        first, second = self.sources
        # in this process: the children find the device open and the graphs traced
        for length in (128, 136):
            self._here("build", "--src", first, "--out", folder / f"old{length}", "--max-length", str(length))
        convert, build = self._convert(second), self._build(second)
        self.jobs = [
            self._job("convert", convert, None),
            self._job("convert", convert, folder / "old128"),
            self._job("compile", lambda out: ["compile", out, "--max-length", "136"], folder / "old128"),
            self._job("build", build, None),
            self._job("build", build, folder / "old128"),
        ]

    def _convert(self, source: Path) -> Callable[[Path], list["str | Path"]]:
        return lambda out: ["convert", "--src", source, "--out", out]

    def _build(self, source: Path) -> Callable[[Path], list["str | Path"]]:
        return lambda out: ["build", "--src", source, "--out", out, "--max-length", "136"]

    def _here(self, *words: "str | Path") -> None:
        try:
            command(words)()
        except SystemExit as exit:
            if exit.code:
                raise

    def place(self, old: Path | None) -> Path:
        """A fresh folder with `old` at the target in it."""
        parent = self.folder / "place"
        if parent.exists():
            shutil.rmtree(parent)
        parent.mkdir()
        if old is not None:
            shutil.copytree(old, parent / "a")
        return parent / "a"

    def _job(self, name: str, words: Callable[[Path], list["str | Path"]], old: Path | None) -> Job:
        target = self.place(old)
        whole = run(command(words(target)))
        if whole.code:
            raise RuntimeError(f"{name} fails undisturbed: {whole.printed}")
        return Job(name, words, old, tree(target), whole)


def state(target: Path, old: Path | None, new: Tree) -> str:
    """ "old", "new", or what else stands at the target."""
    if not target.exists() and old is None:
        return "old"
    try:
        with open_artifact(target) as artifact:
            artifact.check_all()
    except ToolchainError as error:
        return f"no whole artifact: {error}"
    found = tree(target)
    if found == new:
        return "new"
    return "old" if old is not None and found == tree(old) else "neither the old artifact nor the new one"


def check_rerun(job: Job, target: Path) -> str | None:
    """What is wrong once the command has run again; None if all is as after an undisturbed run."""
    again = run(job.work(target))
    if again.code:
        return f"the next run exits with {again.code}: {again.printed[-300:]}"
    if tree(target) != job.new:
        return "the next run gives other bytes"
    beside = sorted(p.name for p in target.parent.iterdir() if p != target)
    return f"left behind: {', '.join(beside)}" if beside else None


def kill(shop: Workshop, name: str, runs: int, rng: random.Random) -> Tally:
    tally = Tally(f"kill -9 of {name}")
    jobs = [job for job in shop.jobs if job.name == name]
    moments = {id(job): killings(job.whole, rng) for job in jobs}
    while tally.runs < runs:
        job = jobs[tally.runs % len(jobs)]
        target = shop.place(job.old)
        trouble = next(moments[id(job)])
        ending = run(job.work(target), trouble)
        if ending.code == 0:
            tally.note("came too late and were repeated")
            continue
        tally.runs += 1
        found = state(target, job.old, job.new)
        tally.note(f"left the {found} one" if found in ("old", "new") else "left neither")
        problem = None if ending.code == -9 else f"exits with {ending.code}: {ending.printed[-300:]}"
        if found not in ("old", "new"):
            problem = found
        problem = problem or check_rerun(job, target)
        if problem:
            tally.failures.append(f"{trouble}: {problem}")
    return tally


def fill_disk(shop: Workshop, runs: int, rng: random.Random) -> Tally:
    """Files may not grow beyond a random size, so that writing fails somewhere."""
    tally = Tally("disk full")
    while tally.runs < runs:
        job = rng.choice(shop.jobs)
        target = shop.place(job.old)
        limit = int(2 ** rng.uniform(0, max(len(data) for data in job.new.values()).bit_length()))
        ending = run(job.work(target), Trouble(file_bytes=limit))
        if ending.code == 0:
            tally.note("had room enough and were repeated")
            continue
        tally.runs += 1
        found = state(target, job.old, job.new)
        problem = found if found != "old" else None
        if ending.code != 2 or "Traceback" in ending.printed or "error: " not in ending.printed:
            problem = f"exits with {ending.code}: {ending.printed[-600:]}"
        problem = problem or check_rerun(job, target)
        if problem:
            tally.failures.append(f"{job.name}, at {limit} bytes: {problem}")
    return tally


def read_only(shop: Workshop) -> Tally:
    """A user who may not write there."""
    tally = Tally("read-only target")
    root = os.geteuid() == 0
    for job in shop.jobs:
        target = shop.place(job.old)
        target.parent.chmod(0o555)
        ending = run(job.work(target), Trouble(nobody=root))
        target.parent.chmod(0o755)
        tally.runs += 1
        found = state(target, job.old, job.new)
        problem = found if found != "old" else None
        if ending.code != 2 or "Traceback" in ending.printed:
            problem = f"exits with {ending.code}: {ending.printed[-600:]}"
        problem = problem or check_rerun(job, target)
        if problem:
            tally.failures.append(f"{job.name}: {problem}")
    return tally


def kept_by_its_owner(shop: Workshop) -> Tally:
    """An artifact whose owner made it read-only: refused before anything is written, and no later build is blocked."""
    tally = Tally("read-only artifact")
    for job in (job for job in shop.jobs if job.old is not None):
        target = shop.place(job.old)
        folders = [target, *(path for path in target.rglob("*") if path.is_dir())]
        for folder in folders:
            folder.chmod(0o555)
        ending = run(job.work(target))
        for folder in folders:
            folder.chmod(0o755)
        tally.runs += 1
        found = state(target, job.old, job.new)
        problem = found if found != "old" else None
        if ending.code != 2 or "is read-only" not in ending.printed:
            problem = f"exits with {ending.code}: {ending.printed[-600:]}"
        problem = problem or check_rerun(job, target)
        if problem:
            tally.failures.append(f"{job.name}: {problem}")
    return tally


def planted(shop: Workshop) -> Tally:
    """Links beside the target that lead to somebody's artifact: refused, and that artifact stays."""
    tally = Tally("planted links")
    for job in shop.jobs:
        for name in (".a.staging", ".a.old", ".a.resume", ".a.lock"):
            target = shop.place(job.old)
            victim = shutil.copytree(shop.folder / "old128", target.parent / "victim")
            (target.parent / name).symlink_to(victim)
            ending = run(job.work(target))
            tally.runs += 1
            problem = None if tree(victim) == tree(shop.folder / "old128") else "the victim was changed"
            if ending.code != 2 or "is a symbolic link" not in ending.printed:
                problem = f"exits with {ending.code}: {ending.printed[-600:]}"
            (target.parent / name).unlink()
            shutil.rmtree(victim)
            problem = problem or check_rerun(job, target)
            if problem:
                tally.failures.append(f"{job.name}, {name}: {problem}")
    return tally


def two_at_once(shop: Workshop, runs: int, rng: random.Random) -> Tally:
    """The same command twice into the same artifact: one of them may be refused."""
    tally = Tally("two builds at once")
    for _ in range(runs):
        job = rng.choice(shop.jobs)
        target = shop.place(job.old)
        begin = time.monotonic()
        children = [start(job.work(target), NONE) for _ in range(2)]
        endings = [finish(pid, reader, begin) for pid, reader in children]
        tally.runs += 1
        codes = sorted(ending.code for ending in endings)
        tally.note("times one was refused" if codes == [0, 2] else "times both came through")
        problem = None if codes in ([0, 0], [0, 2]) else "; ".join(ending.printed[-300:] for ending in endings)
        if codes == [0, 2] and not any("another build is writing it" in e.printed for e in endings):
            # the second began before the first ended, and saw it end
            problem = None if any("run the command again" in e.printed for e in endings) else endings[-1].printed[-300:]
        problem = problem or check_rerun(job, target)
        if problem:
            tally.failures.append(f"{job.name}: {problem}")
    return tally


def load_meanwhile(shop: Workshop, runs: int) -> Tally:
    """A runtime loads and answers while weights are replaced: its answer is that of the old ones or of the new."""
    from qwen2vl_tc.runtime import load

    tally = Tally("builds while a runtime loads")
    answers = {}
    for source in shop.sources:
        target = shop.place(shop.folder / "old128")
        run(command(["convert", "--src", source, "--out", target, "--no-sync"]))
        answers[load(target, "reference").generate(_QUESTION, max_new_tokens=3, do_sample=False).token_ids] = source
    target = shop.place(shop.folder / "old128")

    def rebuild() -> None:
        for i in range(100 * runs):
            try:
                command(["convert", "--src", shop.sources[i % 2], "--out", target, "--no-sync"])()
            except SystemExit as exit:
                if exit.code:
                    raise

    begin = time.monotonic()
    pid, reader = start(rebuild)
    seen = set()
    for _ in range(runs):
        tally.runs += 1
        try:
            made = load(target, "reference").generate(_QUESTION, max_new_tokens=3, do_sample=False).token_ids
        except ToolchainError as error:
            tally.failures.append(str(error))
            continue
        seen.add(made)
        if made not in answers:
            tally.failures.append(f"an answer that is neither's: {made}")
    os.kill(pid, 9)
    finish(pid, reader, begin)
    tally.notes["different artifacts seen"] = len(seen)
    return tally


def torture(runs: int, disk: int, races: int, seed: int) -> list[Tally]:
    """runs: kills in all, shared out as 200 of convert, 80 of compile and 20 of build are of 300."""
    prepare_process()
    remember_traces()
    tallies = []
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        shop = Workshop(Path(name))
        rng = random.Random(seed)
        trials: list[Callable[[], Tally]] = [
            *(
                lambda command=command, share=share: kill(shop, command, max(1, round(runs * share / 300)), rng)
                for command, share in _SHARES.items()
            ),
            lambda: fill_disk(shop, disk, rng),
            lambda: read_only(shop),
            lambda: kept_by_its_owner(shop),
            lambda: planted(shop),
            lambda: two_at_once(shop, races, rng),
            lambda: load_meanwhile(shop, races),
        ]
        for trial in trials:
            begin = time.monotonic()
            tallies.append(trial())
            print(f"{tallies[-1].line()} ({time.monotonic() - begin:.0f} s)", flush=True)
            for failure in tallies[-1].failures:
                print(f"  {failure}", flush=True)
    return tallies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=300, help="kills")
    parser.add_argument("--disk", type=int, default=50, help="full disks")
    parser.add_argument("--races", type=int, default=20, help="races, of each kind")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    tallies = torture(arguments.runs, arguments.disk, arguments.races, arguments.seed)
    failed = sum(len(tally.failures) for tally in tallies)
    print(f"{sum(tally.runs for tally in tallies)} runs, {failed} failures, seed {arguments.seed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
