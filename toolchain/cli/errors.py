"""Exit codes, and the one line that an error becomes."""

import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from ...artifacts.cann import CannWarning
from ...artifacts.errors import ToolchainError
from .console import clean, fail, note, warn
from .streams import STDOUT, abandon_stdout

FAILED = 1  # the work was done and its answer is no: verification failed
REFUSED = 2  # the input, the machine or the command line is at fault
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE
# what to install for a package that is not there
_EXTRAS = {"torch": "compile", "transformers": "compile", "torch_npu": "npu", "torchair": "npu", "onnx": "onnx"}


class Commands(TyperGroup):
    """Runs a command and turns whatever it raises into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # "bench cold-start" is a command beside "bench", which takes an artifact where a group would take commands
        two_words = " ".join(args[:2])
        return super().resolve_command(ctx, [two_words, *args[2:]] if two_words in self.commands else args)

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _usage_errors_clean():
            return super().make_context(*args, **options)

    def main(self, *args: Any, **options: Any) -> Any:
        # --help and --version print while the line is parsed, before any command is invoked
        try:
            return super().main(*args, **options)
        except SystemExit as error:
            # rich and click leave with 1 where a reader has gone away
            if isinstance(error.__context__, BrokenPipeError):
                abandon_stdout()
                raise SystemExit(BROKEN_PIPE) from error
            code = _flushed()
            if code:
                raise SystemExit(code) from error
            raise
        except (ToolchainError, OSError, MemoryError, UnicodeEncodeError) as error:
            raise SystemExit(_code(error, debug=False)) from error

    def invoke(self, ctx: Any) -> Any:
        with _own_warnings_in_one_line(), _usage_errors_clean():
            return self._invoke(ctx)

    def _invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            value = super().invoke(ctx)
            # a reader that has gone away is noticed here, and not by Python when it exits
            sys.stdout.flush()
        except KeyboardInterrupt as error:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except Exception as error:
            if _is_own(error):
                raise
            raise typer.Exit(_code(error, debug)) from error
        return value


@contextmanager
def _own_warnings_in_one_line() -> Iterator[None]:
    """Our warnings as every other note of this command line; those of others as they are."""
    original = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, CannWarning):
            warn(str(message))
        else:
            original(message, category, *where, **more)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = original


@contextmanager
def _usage_errors_clean() -> Iterator[None]:
    """typer prints its usage errors itself, and they repeat what was typed: it is cleaned before."""
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None)
        if _is_own(error) and isinstance(message, str):
            error.message = clean(message)  # type: ignore[attr-defined]
        raise


def _is_own(error: Exception) -> bool:
    # typer's and click's control flow: exits, and usage errors that it prints itself; some versions of typer carry a
    # click of their own, so the classes have no one name to import
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")


def _trace(debug: bool) -> None:
    if debug:
        for line in traceback.format_exc().splitlines():
            note(line)


def _flushed() -> int:
    """Write what is left for standard output; the exit code where that fails."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return _code(error, debug=False)
    return 0


def _code(error: Exception, debug: bool) -> int:
    """Print the one line of an error; returns its exit code."""
    if isinstance(error, BrokenPipeError):
        # what is still buffered has nowhere to go; Python would complain about that at exit
        abandon_stdout()
        return BROKEN_PIPE
    _trace(debug)
    said = _said(error)
    if said is None:
        more = "" if debug else "; run it again as `qwen2vl-tc --debug ...` for the traceback, and report it"
        fail(f"this is a bug in qwen2vl-tc: {type(error).__name__}: {error}{more}")
        return BUG
    fail(said)
    return REFUSED


def _said(error: Exception) -> str | None:
    """What is wrong with the input or the machine; None where it is neither."""
    if isinstance(error, ToolchainError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:
        named = isinstance(error.filename, str | bytes | os.PathLike)
        if error.filename == STDOUT:
            abandon_stdout()
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if named else str(error.strerror)
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {error}' if str(error) else ''}; free some, or ask for less"
    if isinstance(error, ImportError) and not (error.name or "").startswith("qwen2vl_tc"):
        return _import_failed(error)
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= c <= "\udfff" for c in error.object):
        return f"{error.object[:200]!r} is not UTF-8, and what has to read it takes nothing else; rename it"
    return None


def _import_failed(error: ImportError) -> str:
    package = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and package in _EXTRAS:
        return f"this needs {package}, which is not installed; pip install 'qwen2vl-tc[{_EXTRAS[package]}]'"
    if isinstance(error, ModuleNotFoundError) and package:
        return f"this needs {package}, which is not installed; pip install {package}"
    # the loader's reason comes last, behind a page of advice: memory, or a library that is not there
    reason = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no reason given")
    return f"{package or 'a package'} cannot be imported ({reason}); free memory, or install it again"
