"""Commands run in forked children that are killed, starved or slowed: nothing is imported or traced twice."""

import copy
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_FILE_EVENTS = ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "shutil.rmtree")


@dataclass(frozen=True)
class Trouble:
    """What happens to a command: SIGKILL after `seconds` or before its `event`-th use of the file system, files limited
    to `file_bytes`, or a user who may only read."""

    seconds: float | None = None
    event: int | None = None
    file_bytes: int | None = None
    nobody: bool = False


NONE = Trouble()


@dataclass(frozen=True)
class Ending:
    """How a child ended: its exit code (-9 when killed), what it printed, how long it ran, and its uses of files."""

    code: int
    printed: str
    seconds: float
    events: int


def remember_traces() -> None:
    """Trace each graph once in this process; what a killed command would have traced again touches no file."""
    from torch.utils._pytree import tree_map

    from qwen2vl_tc.exporters.torchair import trace as module

    real, known = module.trace, {}

    def trace(name: str, method: Any, arguments: Any, *rest: Any, **more: Any) -> Any:
        key = (name, repr(tree_map(lambda value: tuple(getattr(value, "shape", ())), dict(arguments))))
        if key not in known:
            known[key] = real(name, method, arguments, *rest, **more)
        # passes work on the graph in place
        return replace(known[key], model=copy.deepcopy(known[key].model))

    module.trace = trace


def _count_events(kill_at: int | None, count: list[int]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _run(work: Callable[[], None], trouble: Trouble, out: int) -> None:
    os.dup2(out, 1)
    os.dup2(out, 2)
    count = [0]
    code = 0
    try:
        if trouble.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.file_bytes, resource.RLIM_INFINITY))
        if trouble.nobody:
            os.setegid(65534)
            os.seteuid(65534)
        _count_events(trouble.event, count)
        work()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 99
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(out, f"\nevents {count[0]}".encode())
        os._exit(code)


def start(work: Callable[[], None], trouble: Trouble = NONE) -> tuple[int, int]:
    """Fork and run; returns the process and the reading end of what it prints."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _run(work, trouble, writer)
    os.close(writer)
    return pid, reader


def finish(pid: int, reader: int, begin: float) -> Ending:
    with open(reader, "rb") as file:
        printed = file.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    text, _, events = printed.rpartition("\nevents ")
    return Ending(
        os.waitstatus_to_exitcode(status),
        text or printed,
        time.monotonic() - begin,
        int(events) if events.isdigit() else 0,
    )


def run(work: Callable[[], None], trouble: Trouble = NONE) -> Ending:
    """Run `work` in a child to its end, natural or not."""
    begin = time.monotonic()
    pid, reader = start(work, trouble)
    if trouble.seconds is not None:
        time.sleep(trouble.seconds)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is still there, unreaped
    return finish(pid, reader, begin)


def command(words: Sequence["str | Path"]) -> Callable[[], None]:
    """`qwen2vl-tc words...`, as its console script runs it."""

    def work() -> None:
        from qwen2vl_tc.toolchain.cli.main import app

        sys.argv = ["qwen2vl-tc", *map(str, words)]
        app()

    return work


def killings(whole: Ending, rng: random.Random) -> Iterator[Trouble]:
    """Moments to kill at, without end: half by the clock, half between two uses of the file system."""
    while True:
        if rng.random() < 0.5:
            yield Trouble(seconds=rng.uniform(0, whole.seconds))
        else:
            yield Trouble(event=rng.randint(1, max(whole.events, 1)))


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing of a command run in this process is printed."""
    sys.stdout.flush()
    kept, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
        os.close(null)
