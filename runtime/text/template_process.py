"""The process that renders chat templates, run by path: jinja2 as transformers sets it up, and limits of the kernel's.

Imports nothing of ours, so that it starts fast. A request is a line of JSON {source, values or null}; so is the reply:
{text}, or {kind, message} of an error.
"""

import json
import re
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any


def _environment() -> Any:
    # imported before files are out of reach: jinja2 imports these two when it needs them
    import pprint  # noqa: F401

    import jinja2.debug  # noqa: F401
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationTag(Extension):
        """transformers' {% generation %} marks text for training; here it only frames it."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_framed"), [], [], body).set_lineno(line)

        def _framed(self, caller: Any) -> Any:
            return caller()

    class PlainNamespace(Namespace):
        """Without names that begin with an underscore."""

        def __init__(self, /, *args: Any, **kwargs: Any) -> None:
            super().__init__()
            for name, value in dict(*args, **kwargs).items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")
            super().__setitem__(name, value)

    def to_json(
        x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            """jinja2 prints nothing for what it forbids; an artifact that tries is refused."""
            raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
    made.filters["tojson"] = to_json
    made.globals |= {
        # not the class itself, which has attributes
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PlainNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return made


def _strftime_now(pattern: str) -> str:
    # the C library takes a width, and answers with nothing where it has no memory for that
    if re.search(r"%\D?\d{3}", pattern):
        raise ValueError(f"strftime_now({pattern[:32]!r}): no widths of three digits and more")
    return datetime.now().strftime(pattern)


class _RefusedError(Exception):
    """The template called raise_exception."""


def _raise_exception(message: Any) -> None:
    raise _RefusedError(message)


def _limit(memory: int) -> None:
    """Take from this process what rendering does not need: memory, files, processes, and dumps of itself."""
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))


def _answer(compiled: Any, line: bytes, memory: int, size: int) -> dict[str, Any]:
    from jinja2 import TemplateSyntaxError

    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        template = compiled(request["source"])
        if request["values"] is None:
            return {"text": ""}
        text = template.render(request["values"])
        if len(text) > size:
            return {"kind": "stopped", "message": f"wrote more than {size} characters"}
        return {"text": text}
    except _RefusedError as error:
        return {"kind": "refused", "message": str(error)[:2000]}
    except MemoryError:
        return {"kind": "stopped", "message": f"needed more than {memory >> 20} MB"}
    except TemplateSyntaxError as error:
        return {"kind": "failed", "message": f"line {error.lineno}: {str(error.message)[:500]}"}
    except Exception as error:  # a template can raise anything that Python's operators raise
        return {"kind": "failed", "message": f"failed with {type(error).__name__}: {str(error)[:500]}"}


def main() -> None:
    """Serve requests until the other end is closed. Arguments: a JSON object of Limits, and the folders to import
    from."""
    # the time limit is this signal: whoever starts this process may ignore it or hold it back, and both are inherited
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    limits = json.loads(sys.argv[1])
    sys.path += sys.argv[2:]
    compiled = lru_cache(4)(_environment().from_string)
    # what is read at its first use is read now: the codec of string literals, the time zone
    compiled("{{ '\\n' ~ strftime_now('%c') }}").render()
    _limit(limits["memory"])
    for line in sys.stdin.buffer:
        # the kernel ends this process, whatever it is in the middle of
        signal.setitimer(signal.ITIMER_REAL, limits["seconds"])
        reply = json.dumps(_answer(compiled, line, limits["memory"], limits["size"]))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
