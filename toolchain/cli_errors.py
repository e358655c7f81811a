"""Exit codes, and the one line that an error becomes."""

import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from ..artifacts.errors import ToolchainError
from .console import fail, note

FAILED = 1  # the work was done and its answer is no: verification failed
REFUSED = 2  # the input, the machine or the command line is at fault
BUG = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE


class Commands(TyperGroup):
    """Runs a command and turns whatever it raises into one line on stderr and an exit code."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        # "bench cold-start" is a command beside "bench", which takes an artifact where a group would take commands
        two_words = " ".join(args[:2])
        return super().resolve_command(ctx, [two_words, *args[2:]] if two_words in self.commands else args)

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            value = super().invoke(ctx)
            # a reader that has gone away is noticed here, and not by Python when it exits
            sys.stdout.flush()
        except ToolchainError as error:
            _trace(debug)
            fail(str(error))
            raise typer.Exit(REFUSED) from error
        except KeyboardInterrupt as error:
            note("interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except BrokenPipeError as error:
            # what is still buffered has nowhere to go; Python would complain about that at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from error
        except OSError as error:
            if error.errno is None:
                raise _bug(error, debug) from error
            _trace(debug)
            where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
            fail(f"{where}{error.strerror}")
            raise typer.Exit(REFUSED) from error
        except Exception as error:
            if _is_own(error):
                raise
            raise _bug(error, debug) from error
        return value


def _is_own(error: Exception) -> bool:
    # typer's and click's control flow: exits, and usage errors that it prints itself; some versions of typer carry a
    # click of their own, so the classes have no one name to import
    return isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code")


def _trace(debug: bool) -> None:
    if debug:
        for line in traceback.format_exc().splitlines():
            note(line)


def _bug(error: Exception, debug: bool) -> typer.Exit:
    _trace(debug)
    more = "" if debug else "; run it again as `qwen2vl-tc --debug ...` for the traceback, and report it"
    fail(f"this is a bug in qwen2vl-tc: {type(error).__name__}: {error}{more}")
    return typer.Exit(BUG)
