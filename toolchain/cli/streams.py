"""The standard streams as a command finds them: closed, full, or with an encoding that has not every character."""

import io
import os
import sys
from typing import Any, TextIO

from ...artifacts.errors import TargetError

STDOUT = "standard output"


def prepare_streams() -> None:
    """Make the process' streams safe to print on, whatever they are. Called once, before anything else.

    A closed descriptor becomes /dev/null: the next file to be opened would take its number, and whatever is printed
    would end up in it. Characters that an encoding lacks become escapes. What cannot be written to standard error is
    dropped, as the exit code says the same; what cannot be written to standard output is an OSError that names it.
    Raises TargetError where standard output is closed: an answer would be lost, and nothing has been done yet.
    """
    closed = [fd for fd in range(3) if _is_closed(fd)]
    for _ in closed:
        # takes the lowest number that is free
        os.open(os.devnull, os.O_RDWR)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8")
    # bytes that are not the encoding's reach the code that knows what they are for
    _reconfigure(sys.stdin, errors="surrogateescape")
    sys.stderr = _writer(_Dropping(2, "w", closefd=False), sys.stderr)
    sys.stdout = _writer(_Named(1, "w", closefd=False), sys.stdout)
    if 1 in closed:
        raise TargetError(f"{STDOUT} is closed; send it to a file, or to {os.devnull}")


def abandon_stdout() -> None:
    """Send what is still to be written to standard output to nowhere: Python would fail on it once more at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stdout.fileno())
    except (OSError, ValueError):
        # a test's stand-in has no descriptor, and keeps nothing back
        return
    finally:
        os.close(nowhere)


class _Named(io.FileIO):
    """Standard output; its errors name it."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, STDOUT) from error


class _Dropping(io.FileIO):
    """Standard error, where there may be nobody to tell."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _writer(raw: io.FileIO, stream: TextIO | None) -> TextIO:
    if isinstance(stream, io.TextIOWrapper):
        stream.flush()
        encoding, lines = stream.encoding, stream.line_buffering
    else:
        encoding, lines = "utf-8", False
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding, errors="backslashreplace", line_buffering=lines or isinstance(raw, _Dropping)
    )


def _reconfigure(stream: TextIO, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=errors)


def _is_closed(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return True
    return False
