"""Importing torch-npu and torchair without what that does to the process around them."""

import contextlib
import io
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# Printed by torch-npu where CANN is absent: of no use to whoever works without it on purpose.
_NOISE = ("ASCEND_HOME_PATH environment variable is not set", "require processing for 32 padding size")
# What stands in for torch-npu's operators and must go before it defines them.
_before: list[Callable[[], None]] = []


def before_vendor_import(undo: Callable[[], None]) -> None:
    """Have `undo` called once, when the vendor packages are about to be imported."""
    _before.append(undo)


@contextmanager
def vendor_import() -> Iterator[None]:
    """Inside, import the vendor packages: signal handlers stay the caller's, stdout stays clean."""
    while _before:
        _before.pop()()
    # without a stderr of its own (a daemon's, a notebook's) there is nothing to keep clean
    quiet = _without_noise() if sys.stderr is not None and _is_open(2) else contextlib.nullcontext()
    with quiet, _own_signal_handlers():
        yield


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Undo what importing torchair does to Ctrl-C and SIGTERM: its handlers kill the process where it stands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hold back what Python and C++ print meanwhile, then let through to stderr all but known useless lines."""
    printed = io.StringIO()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        original = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            # stdout may be a command's JSON: torch-npu prints its warnings there
            with contextlib.redirect_stdout(printed):
                yield
        finally:
            sys.stderr.flush()
            os.dup2(original, 2)
            os.close(original)
            held.seek(0)
            text = held.read().decode(errors="replace") + printed.getvalue()
            for line in text.splitlines():
                if not any(noise in line for noise in _NOISE):
                    print(line, file=sys.stderr)


@contextmanager
def no_lost_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end if one came and was lost: Python drops what is raised inside a finaliser, and
    torch runs thousands of those while it traces."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        before(number, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt
