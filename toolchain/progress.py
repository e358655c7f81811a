"""How far a piece of work is: what it calls as it goes on, and what is called where nobody watches."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

# (bytes done, bytes in all), in steps of a few MB
BytesProgress = Callable[[int, int], None]
# (what is being done, steps done, steps in all)
StepProgress = Callable[[str, int, int], None]


def no_bytes(done: int, total: int) -> None:
    """Nobody watches."""


def no_steps(step: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Displays:
    """How the progress of each task is shown: context managers, entered with the task's name while it runs."""

    copy: Callable[[str], AbstractContextManager[BytesProgress]] = lambda task: nullcontext(no_bytes)
    steps: Callable[[str], AbstractContextManager[StepProgress]] = lambda task: nullcontext(no_steps)
