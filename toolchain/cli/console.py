"""Where the command line prints: results to stdout, everything else to stderr; progress bars on terminals only."""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unicodedata import category

from ..progress import BytesProgress, StepProgress
from ..words import format_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

# a pipe or a file has no width of its own, and rich would cut tables at 80 columns
_FILE_WIDTH = 160
# between two progress lines where there is no terminal
_LINE_SECONDS = 5.0

# Unicode's bidirectional controls: they show text in another order than it has
_DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def stdout() -> "Console":
    """The console for results."""
    return _console(stderr=False)


def stderr() -> "Console":
    """The console for progress, notes and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> "Console":
    stream = sys.stderr if stderr else sys.stdout
    # what is printed may come from an artifact: brackets and colons in it mean nothing
    width = None if stream.isatty() else _FILE_WIDTH
    return _clean_console()(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


@functools.cache
def _clean_console() -> "type[Console]":
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.table import Table

    class CleanConsole(Console):
        """Cleans all text, whoever made it and however it is styled; the styles' own codes come later. Folds what is
        too wide for its column, where rich would cut it."""

        def print(self, *objects: Any, **options: Any) -> None:
            for table in objects:
                for column in table.columns if isinstance(table, Table) else ():
                    column.overflow = "fold"
            super().print(*objects, **options)

        def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(clean(segment.text), segment.style)

    return CleanConsole


def _is_harmful(character: str) -> bool:
    return category(character) in ("Cc", "Zl", "Zp", "Cs") or character in _DIRECTIONS


def clean(text: str, kept: str = "\n\t") -> str:
    """Text that cannot steer a terminal: what is no character to be read becomes U+FFFD.

    Control characters, C0 and C1, but those in `kept`; overrides and marks of direction; line and paragraph separators;
    lone surrogates. All that the command line prints goes through here, or through `result_json`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join("\ufffd" if _is_harmful(c) and c not in kept else c for c in text)


def note(message: str) -> None:
    """One line for people, on stderr: what happens, which choice was made and why."""
    print(clean(message.replace("\n", " ")), file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """One line for people about something that will matter later."""
    note(f"warning: {message}")


def fail(message: str) -> None:
    """The one line of an error."""
    note("error: " + " ".join(message.split()))


def result(line: str) -> None:
    """One line of a command's result, or several."""
    print(clean(line), flush=True)


def result_json(value: Any, indent: int | None = 2) -> None:
    """A command's result as one JSON object; harmful characters in it are escaped, so that its values are whole."""
    # where the stream lacks a character it writes an escape of Python's, which JSON does not know
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=indent, ensure_ascii=not utf8)
    if not (text.isascii() and text.isprintable()):
        # outside of strings, JSON has no other control character than the line break
        text = "".join(f"\\u{ord(c):04x}" if _is_harmful(c) and c != "\n" else c for c in text)
    print(text, flush=True)


def write_text(piece: str) -> None:
    """A piece of generated text, as it comes; whole where a file or a program takes it, clean on a terminal."""
    sys.stdout.write(clean(piece) if sys.stdout.isatty() else piece)
    sys.stdout.flush()


@contextmanager
def bytes_progress(task: str) -> Iterator[BytesProgress]:
    """Progress of a copy: a bar with bytes and rate, or a line every few seconds."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with _bar(*columns, TimeRemainingColumn()) as bar:
            shown = bar.add_task(task, total=None)
            yield lambda done, total: bar.update(shown, completed=done, total=total)
        return
    begin = last = time.monotonic()
    first: int | None = None
    state = (0, 0)

    def line(done: int, total: int) -> None:
        nonlocal last, first, state
        if first is None:
            first = done
            resumed = f", {format_bytes(done)} of it there already" if done else ""
            note(f"{task}: {format_bytes(total)}{resumed}")
        state = (done, total)
        if time.monotonic() - last >= _LINE_SECONDS and done < total:
            last = time.monotonic()
            note(f"{task}: {format_bytes(done)} of {format_bytes(total)} ({_rate(done - first, last - begin)})")

    yield line
    if first is not None:
        seconds = time.monotonic() - begin
        copied = state[0] - first
        note(
            f"{task}: done"
            + (f", {format_bytes(copied)} in {seconds:.1f} s ({_rate(copied, seconds)})" if copied else "")
        )


def _rate(count: int, seconds: float) -> str:
    return f"{format_bytes(int(count / max(seconds, 1e-9)))}/s"


@contextmanager
def step_progress(task: str) -> Iterator[StepProgress]:
    """Progress through named steps: a bar with the step's name, or a line for each step."""
    if sys.stderr.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        # Redrawn at each step only: while the emulated device is opened, what vendor code prints on stderr is held
        # back and searched for noise, and a bar redrawn from a thread would be taken for that.
        with _bar(*columns, auto_refresh=False) as bar:
            shown = bar.add_task(task, total=None)
            yield lambda step, done, total: bar.update(
                shown, description=f"{task}: {step}", completed=done, total=total, refresh=True
            )
        return
    begin = time.monotonic()
    last = ""

    def line(step: str, done: int, total: int) -> None:
        nonlocal last
        if step != last:
            last = step
            note(f"{task}: {step} ({done}/{total}, {time.monotonic() - begin:.1f} s)")

    yield line


@contextmanager
def token_progress(task: str) -> Iterator[Callable[[], None]]:
    """Progress of a batch, whose texts come at its end: a count of tokens and their rate, or nothing without a
    terminal."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.progress import TextColumn, TimeElapsedColumn

    with _bar(TextColumn("{task.description}: {task.completed} tokens", markup=False), TimeElapsedColumn()) as bar:
        shown = bar.add_task(task, total=None)
        yield lambda: bar.advance(shown)


def _bar(*columns: Any, auto_refresh: bool = True) -> "Progress":
    from rich.progress import Progress

    return Progress(*columns, console=stderr(), auto_refresh=auto_refresh)
