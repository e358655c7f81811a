"""The chat template: rendered as transformers does, in a process of its own that can be stopped at any moment.

A template is code that came with the checkpoint. jinja2's sandbox keeps it away from Python's internals; it keeps no
template from running for ever inside one operator, nor from filling the memory. The process that renders has neither
files nor processes to open, 256 MB of memory, and is killed when it does not answer in time.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...artifacts.errors import ArtifactError, RequestError, TargetError

_PROGRAM = Path(__file__).with_name("template_process.py")
# The process keeps its time limit itself. Only one that cannot (it is stopped, or its imports hang) is waited for as
# long as this beyond it.
_GRACE_SECONDS = 15.0
_WHOSE = "is {} (sys.executable) a Python, and jinja2 installed?"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a template may cost. Sizes are in characters, of the source and of what goes in and out; memory in bytes."""

    source_size: int = 1 << 16
    size: int = 1 << 20
    seconds: float = 5.0
    memory: int = 256 << 20


class Renderer:
    """The process that renders. Starts at once and imports beside whatever its owner does; one request at a time.

    A process that was stopped is started again by the next request; a forked copy of the owner gets one of its own.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._process: Any = None
        self._stop: Any = None
        # where none can be started, the first request says so: a prompt that is text needs no template
        with suppress(OSError, TargetError):
            self._start()

    def _start(self) -> None:
        if not sys.executable:
            raise TargetError(
                "cannot start the process that renders chat templates: sys.executable is empty, as in a program that "
                "embeds Python; set it to the path of the Python that has jinja2"
            )
        # absolute folders only, behind the standard library's
        folders = [folder for folder in sys.path if os.path.isabs(folder)]
        words = [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps(dataclasses.asdict(self.limits)), *folders]
        pipe = subprocess.PIPE
        # a session of its own: Ctrl-C in the terminal is not for it
        self._process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._stop = weakref.finalize(self, _stop, self._process)

    def ask(self, source: str, values: str | None) -> dict[str, str]:
        """{text}, or {kind, message} of an error, for a template and the JSON of its variables. Raises TargetError."""
        if self._owner != os.getpid():
            # another process' pipes and, perhaps, a lock that a thread of it held
            self._lock, self._owner, self._stop = threading.Lock(), os.getpid(), None
        request = f'{{"source": {json.dumps(source)}, "values": {values or "null"}}}\n'.encode("utf-8", "surrogatepass")
        with self._lock:
            try:
                if self._stop is None or not self._stop.alive:
                    self._start()
                reply, is_late = self._exchange(request)
                return json.loads(reply) if reply else self._ended(is_late)
            except OSError as error:
                raise TargetError(f"cannot start the process that renders chat templates: {error}") from error
            except ValueError as error:
                self.close()
                raise TargetError(
                    f"the process that renders chat templates answers {reply[:80]!r}; {_WHOSE.format(sys.executable)}"
                ) from error
            except BaseException:
                # what it answers would be taken for the answer to the next request
                self.close()
                raise

    def _exchange(self, request: bytes) -> tuple[bytes, bool]:
        """The reply, empty if the process has ended; and whether that was for neither reading nor answering."""
        allowed = self.limits.seconds + _GRACE_SECONDS
        end = time.monotonic() + allowed
        deadline = threading.Timer(allowed, self._process.kill)
        deadline.daemon = True
        try:
            deadline.start()
        except RuntimeError as error:
            raise TargetError(f"cannot wait for the process that renders chat templates: {error}") from error
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = b""
        finally:
            deadline.cancel()
        return reply, time.monotonic() >= end

    def _ended(self, is_late: bool) -> dict[str, str]:
        code = self._process.wait()
        self.close()
        if code >= 0:
            raise TargetError(
                f"the process that renders chat templates failed ({code}); {_WHOSE.format(sys.executable)}"
            )
        if is_late:
            message = f"gave no answer within {self.limits.seconds + _GRACE_SECONDS} s"
        elif code == -signal.SIGALRM:
            message = f"ran longer than {self.limits.seconds} s"
        else:
            message = f"ended its process by {signal.Signals(-code)!r}"
        return {"kind": "stopped", "message": message}

    def close(self) -> None:
        """End the process."""
        if self._stop is not None:
            self._stop()


def _stop(process: Any) -> None:
    # in a forked copy of the owner, Popen finds that it is no child of this process and leaves it alone
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        # what was not sent is not wanted any more
        with suppress(BrokenPipeError):
            pipe.close()


def _plain(value: Any) -> Any:
    """What a template sees of a value that is none of JSON's: an image, array or path becomes "<its type>"."""
    if isinstance(value, np.generic):
        return value.item()
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


class ChatTemplate:
    """A chat template that compiles."""

    def __init__(
        self,
        source: str,
        name: str = "chat_template",
        limits: Limits | None = None,
        renderer: Renderer | None = None,
    ) -> None:
        """`name` is how errors call it; `renderer`, if one was started already, brings its own limits.

        Raises ArtifactError when it does not compile or is too large.
        """
        self._name = name
        self._limits = renderer.limits if renderer else limits or Limits()
        if len(source) > self._limits.source_size:
            raise ArtifactError(f"{name}: {len(source)} characters, at most {self._limits.source_size}")
        self._source = source
        self._renderer = renderer or Renderer(self._limits)
        self._ask(None)

    def render(self, messages: list[Any], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, as transformers' apply_chat_template(..., tokenize=False) with these variables.

        Raises RequestError when the conversation is too large or the template refuses it by raise_exception;
        ArtifactError when the template fails, takes too long or too much, or tries what the sandbox forbids;
        TargetError when no process can be started.
        """
        given = {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        values = {"tools": None, "documents": None, **given}
        try:
            plain = json.dumps(values, ensure_ascii=False, default=_plain)
        except (ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"{self._name}: the conversation is too deep, or no plain data: {error}") from error
        if len(plain) > self._limits.size:
            raise RequestError(
                f"{self._name}: the conversation is too large: {len(plain)} characters, at most {self._limits.size}"
            )
        return self._ask(plain)

    def _ask(self, values: str | None) -> str:
        reply = self._renderer.ask(self._source, values)
        if "text" in reply:
            return reply["text"]
        message = reply["message"]
        if reply["kind"] == "refused":
            raise RequestError(f"{self._name}: the template refuses this conversation: {message}")
        raise ArtifactError(f"{self._name}: {'stopped: the template ' * (reply['kind'] == 'stopped')}{message}")
