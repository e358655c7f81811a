"""How far a piece of work is: what it calls as it goes on, and what is called where nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

# (bytes done, bytes in all), in steps of a few MB
BytesProgress = Callable[[int, int], None]
# (what is being done, steps done, steps in all)
StepProgress = Callable[[str, int, int], None]


def no_bytes(done: int, total: int) -> None:
    """Nobody watches."""


def no_steps(step: str, done: int, total: int) -> None:
    """Nobody watches."""


@contextmanager
def _no_copy(task: str) -> Iterator[BytesProgress]:
    yield no_bytes


@contextmanager
def _no_task(task: str) -> Iterator[StepProgress]:
    yield no_steps


@dataclass(frozen=True)
class Displays:
    """How the progress of each task is shown: context managers, entered with the task's name while it runs."""

    copy: Callable[[str], AbstractContextManager[BytesProgress]] = _no_copy
    steps: Callable[[str], AbstractContextManager[StepProgress]] = _no_task
