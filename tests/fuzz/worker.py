"""Loads one artifact after the other, as a user would, and says what came of each: a line of JSON for a line of path.

The first path is a clean artifact: its answers are those that others are compared with, and its memory is the measure.
"""

import contextlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import jinja2
import jinja2.debug  # imported by jinja2 itself only when a template first fails
from helpers.released import REQUESTS

SPARE_BYTES = 512 << 20
_TOKENS = 3
_FORBIDDEN = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn"),
    *("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate"),
    *("pickle.find_class", "marshal.load", "marshal.loads", "ctypes.dlopen", "shutil.rmtree", "os.kill"),
    *("socket.__new__", "socket.connect", "socket.bind", "urllib.Request", "glob.glob", "os.listdir"),
)
_LIBRARY = str(Path(jinja2.__file__).parent)
# how jinja2.debug gives a template's error a traceback
_JINJA_TRACEBACK = b"raise __jinja_exception__"
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_seen: list[str] = []
_armed = False


# how the process that renders templates is started and ended; the template itself is in there
_OF_RENDERERS = ("subprocess.Popen", "os.kill", "open", "os.posix_spawn", "os.fork", "ctypes.dlopen")


def _renderer_asks() -> bool:
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith("/runtime/text/template.py"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Code of an artifact would have to do one of these to be of use to whoever wrote it."""
    if not _armed or (event in _OF_RENDERERS and _renderer_asks()):
        return
    # dlopen(None) is the process itself, asked whether it emulates the device
    if event in _FORBIDDEN and (event, arguments) != ("ctypes.dlopen", (None,)):
        _seen.append(f"{event} {arguments!r}"[:200])
    elif event == "open":
        path, _, flags = arguments
        # a relative path counts from an open folder; jinja2 reads its own source for the traceback of a template
        named = os.fsdecode(path) if isinstance(path, str | bytes) else ""
        inside = named.startswith((_folder, _LIBRARY)) if os.path.isabs(named) else ".." not in named.split("/")
        if (flags or 0) & _WRITES or not inside:
            _seen.append(f"open {path!r} {flags}")
    elif event == "exec":
        code = arguments[0]
        if code.co_filename != "<template>" and code.co_names != ("__jinja_exception__",):
            _seen.append(f"exec {code!r}")
    elif event == "compile" and arguments[1] != "<template>" and (arguments[0] or b"").strip() != _JINJA_TRACEBACK:
        _seen.append(f"compile {arguments[1]!r}")


_folder = ""


def answers(path: str) -> list[Any]:
    """Everything that a user gets to see of an artifact."""
    from qwen2vl_tc.artifacts.errors import ToolchainError
    from qwen2vl_tc.runtime import load
    from qwen2vl_tc.runtime.ops import OPERATORS
    from qwen2vl_tc.toolchain.inspect.inspect import inspect_artifact

    # each is imported when a graph first has it: that is reading our own files, and no sign of anything
    for name in OPERATORS:
        OPERATORS[name]
    with contextlib.suppress(ToolchainError):  # loading says its own
        inspect_artifact(Path(path), None, None)
    model = load(path)
    try:
        found: list[Any] = []
        for messages, pictures, _ in REQUESTS:
            made = model.generate(messages, pictures, max_new_tokens=_TOKENS)
            found.append([list(made.prompt_token_ids), list(made.token_ids), made.text])
        drawn = model.generate(
            REQUESTS[1][0], max_new_tokens=_TOKENS, do_sample=True, temperature=0.7, top_k=20, seed=1
        )
        return [*found, list(drawn.token_ids)]
    finally:
        model.close()


def outcome(path: str, clean: list[Any]) -> dict[str, str]:
    from qwen2vl_tc.artifacts.errors import ToolchainError

    global _armed, _folder
    _seen.clear()
    _folder = path
    _armed = True
    try:
        found = answers(path)
    except ToolchainError as error:
        _armed = False
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(repr(cause))
            cause = cause.__cause__
        # our own error is fine, but not where the memory limit of this process is what prevented worse
        if any("can't allocate memory" in text or text.startswith("MemoryError") for text in causes):
            return {"outcome": "failed", "message": f"memory: {error} from {causes}"}
        result = {"outcome": "refused", "message": str(error)}
    except BaseException as error:
        _armed = False
        if isinstance(error, KeyboardInterrupt):
            raise
        return {"outcome": "failed", "message": "".join(traceback.format_exception(error)[-6:])}
    else:
        _armed = False
        result = {"outcome": "same" if found == clean else "different", "message": ""}
    if _seen:
        return {"outcome": "failed", "message": f"did what only code does: {_seen[:3]}"}
    return result


def main() -> None:
    sys.addaudithook(_watch)
    from qwen2vl_tc.artifacts.host.process import prepare_process

    prepare_process()
    clean: list[Any] | None = None
    for line in sys.stdin:
        path = line.rstrip("\n")
        if clean is None:
            answers(path)
            clean = answers(path)
            with open("/proc/self/status", encoding="ascii") as status:
                peak = next(int(row.split()[1]) << 10 for row in status if row.startswith("VmPeak"))
            resource.setrlimit(resource.RLIMIT_AS, (peak + SPARE_BYTES, peak + SPARE_BYTES))
            print(json.dumps({"outcome": "ready", "message": ""}), flush=True)
        else:
            print(json.dumps(outcome(path, clean)), flush=True)


if __name__ == "__main__":
    main()
