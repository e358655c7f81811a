"""The chat template: rendered like transformers does, in a sandbox that also bounds size and time.

A template is code that came with the checkpoint. jinja2's ImmutableSandboxedEnvironment keeps it away from Python's
internals; it does not keep it from running for ever or filling the memory. So here

- every value that a template can make has a bounded size, counted with shared parts repeated, since that is what
  printing, comparing or copying it costs. Whatever runs inside one C call is thereby short;
- between C calls a trace function looks at the clock, which stops loops that do nothing else;
- filters, globals and methods are those that chat templates use: an allow-list, not a block-list.
"""

import functools
import json
import re
import sys
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ..artifacts.errors import ArtifactError, RequestError

T = TypeVar("T")

_MAX_DEPTH = 64
_MAX_INTEGER_BITS = 4096
# rfind, strip and their like take time proportional to text x argument
_MAX_ARGUMENT = 1024
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "int", "items"),
    *("last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select"),
    *("selectattr", "sort", "string", "title", "unique", "upper"),
)
_STRING_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition"),
    *("removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
_LOOP_ATTRIBUTES = (
    *("index", "index0", "revindex", "revindex0", "first", "last", "length", "depth", "depth0"),
    *("previtem", "nextitem", "cycle", "changed"),
)
_ATTRIBUTES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (str, _STRING_METHODS),
    (Mapping, ("get", "items", "keys", "values")),
    (list, ("count", "index")),
    (tuple, ("count", "index")),
    (LoopContext, _LOOP_ATTRIBUTES),
)
# a trace that raises inside an unrelated object's finaliser would be swallowed: look only at code a template runs in
_TRACED = ("<template>", *(str(Path(file).parent) for file in (jinja2.__file__, json.__file__)), __file__)


@dataclass(frozen=True)
class Limits:
    """What a template may cost. Sizes are in characters plus values; `clock` returns seconds."""

    source_size: int = 1 << 16
    size: int = 1 << 20
    seconds: float = 5.0
    clock: Callable[[], float] = time.monotonic


class _LimitError(BaseException):
    """Not an Exception, so that no `except Exception` inside jinja2 can swallow it."""


class _RefusedError(jinja2.TemplateError):
    """The template called raise_exception."""


def _within(limits: Limits, work: Callable[[], T]) -> T:
    """Run `work` under the deadline. Another tracer, a debugger say, is restored afterwards."""
    end = limits.clock() + limits.seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call" and not frame.f_code.co_filename.startswith(_TRACED):
            return None
        if limits.clock() >= end:
            raise _LimitError(f"ran longer than {limits.seconds} s")
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return work()
    finally:
        sys.settrace(previous)


def _measure(value: Any, limit: int) -> int:
    """Characters plus values in `value`, shared parts counted every time. Raises _LimitError above `limit`."""
    total, stack = 0, [(value, 0)]
    while stack:
        item, depth = stack.pop()
        total += 1
        children: Iterable[Any] = ()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            total += len(item)
            children = (part for pair in item.items() for part in pair)
        elif isinstance(item, list | tuple | KeysView | ValuesView | ItemsView):
            total += len(item)
            children = item
        if total > limit:
            raise _LimitError(f"made a value larger than {limit}")
        if depth > _MAX_DEPTH:
            raise _LimitError(f"nested values more than {_MAX_DEPTH} deep")
        stack.extend((child, depth + 1) for child in children)
    return total


class _Generation(Extension):
    """transformers' {% generation %} marks text for training; here it only frames it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Bounded(NodeTransformer):
    """Route what builds a value without calling anything (a ~ b, [a, b], {a: b}) through the environment."""

    def _through(self, method: str, node: nodes.Expr, arguments: list[nodes.Expr]) -> nodes.Expr:
        call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
        call.set_lineno(node.lineno)
        return call

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        return self._through("joined", node, [self.visit(part) for part in node.nodes])

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        return self._through("bounded", node, [self.generic_visit(node)])  # type: ignore[list-item]

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        # `for a, b in` and `set a, b =` are tuples too, which must stay bare
        return self.visit_List(node) if node.ctx == "load" else node  # type: ignore[arg-type]

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("{% autoescape %} is not supported", node.lineno)


class _Namespace(Namespace):
    """namespace() without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")


def _check_argument(argument: Any) -> None:
    if isinstance(argument, str) and len(argument) > _MAX_ARGUMENT:
        raise _LimitError(f"searched for a text of more than {_MAX_ARGUMENT} characters")


def _raise_exception(message: str) -> None:
    raise _RefusedError(message)


def _strftime_now(pattern: str) -> str:
    # glibc takes a width (%999999999d), which would fill the memory
    if len(pattern) > 256 or re.sub(r"%-?[a-zA-Z%]", "", pattern).count("%"):
        raise SecurityError(f"strftime_now({pattern[:32]!r}): only plain directives such as %d %b %Y")
    return datetime.now().strftime(pattern)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, limits: Limits) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        self.limits = limits
        kept: dict[str, Callable[..., Any]] = {name: self.filters[name] for name in _FILTERS}
        kept |= {"tojson": self._to_json, "join": self._join, "replace": self._replace, "trim": self._trim}
        self.filters = {name: self._bounded_filter(function) for name, function in kept.items()}
        self.globals = {
            "range": self.globals["range"],  # jinja2's own for sandboxes, at most 100 000 long
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _Namespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        return tree

    # what values may become

    def bounded(self, value: T) -> T:
        _measure(value, self.limits.size)
        return value

    def concat(self, pieces: Iterable[str]) -> str:
        """Join what a template, macro or block printed; generated code finds it by this name."""
        kept, total = [], 0
        for piece in pieces:
            total += len(piece)
            if total > self.limits.size:
                raise _LimitError(f"wrote more than {self.limits.size} characters")
            kept.append(piece)
        return "".join(kept)

    def joined(self, *values: Any) -> str:
        return self.concat(str(value) for value in values)

    def _bounded_filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)  # jinja2 marks filters that take the context by an attribute, which this copies
        def run(*args: Any, **kwargs: Any) -> Any:
            value = function(*args, **kwargs)
            # a lazy filter is run at once: a chain of them would hide its cost and its depth
            return self._collect(value) if isinstance(value, Iterator) else self.bounded(value)

        return run

    def _collect(self, items: Iterator[Any]) -> list[Any]:
        kept, total = [], 0
        for item in items:
            total += _measure(item, self.limits.size)
            if total > self.limits.size:
                raise _LimitError(f"made a list larger than {self.limits.size}")
            kept.append(item)
        return kept

    # operators, attributes and calls

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        limit = self.limits.size
        if operator == "+" and isinstance(left, str | list | tuple):
            if _measure(left, limit) + _measure(right, limit) > limit:
                raise _LimitError(f"made a value larger than {limit}")
        elif operator == "%" and isinstance(left, str):
            raise SecurityError("formatting strings with % is not available; join them with ~")
        elif operator in ("*", "**"):
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if not numbers:
                value, times = (right, left) if isinstance(left, int) else (left, right)
                if isinstance(times, int) and _measure(value, limit) * max(times, 0) > limit:
                    raise _LimitError(f"made a value larger than {limit}")
            elif isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
                if bits > _MAX_INTEGER_BITS:
                    raise _LimitError(f"made an integer of more than {_MAX_INTEGER_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return isinstance(obj, Namespace) or any(
            isinstance(obj, kind) and attr in allowed for kind, allowed in _ATTRIBUTES
        )

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        return None  # str.format is not on the allow-list, so it needs no wrapping

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        # the double underscores leave every plain keyword to the template, as in the base class
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join":
            return __self._join(args[0], owner)
        if isinstance(owner, str) and name == "replace":
            return __self._replace(owner, *args, **kwargs)
        if isinstance(owner, str):
            for argument in args:
                _check_argument(argument)
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    # filters and methods that can cost much more than what they are given

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        def pieces() -> Iterator[str]:
            for i, item in enumerate(value):
                if i:
                    yield str(d)
                yield str(item if attribute is None else self.getitem(item, attribute))

        return self.concat(pieces())

    def _replace(self, s: Any, old: Any, new: Any, count: int | None = None) -> str:
        text, old, new = str(s), str(old), str(new)
        _check_argument(old)
        times = text.count(old) if count is None or count < 0 else min(count, text.count(old))
        if len(text) + times * (len(new) - len(old)) > self.limits.size:
            raise _LimitError(f"made a text of more than {self.limits.size} characters")
        return text.replace(old, new, times)

    def _trim(self, value: Any, chars: str | None = None) -> str:
        _check_argument(chars)
        return str(value).strip(chars)

    def _to_json(
        self,
        x: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """json.dumps with transformers' arguments and defaults; unlike jinja2's, it does not escape HTML."""
        if max(len(indent) if isinstance(indent, str) else indent or 0, *map(len, separators or ("", ""))) > 16:
            raise SecurityError("tojson: indent and separators are at most 16 characters")
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return self.concat(encoder.iterencode(x))


def plain_data(value: Any) -> Any:
    """What a template sees of a message: JSON types only; an image, array or path becomes "<its type>"."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    # subclasses carry methods of their own: strip them back
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_data(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_data(item) for item in value)
    return f"<{type(value).__name__}>"


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, name: str = "chat_template", limits: Limits | None = None) -> None:
        """`name` is how errors call it. Raises ArtifactError when it does not compile or is too large."""
        self._name = name
        self._limits = limits or Limits()
        if len(source) > self._limits.source_size:
            raise ArtifactError(f"{name}: {len(source)} characters, at most {self._limits.source_size}")
        # the compiler already evaluates constant expressions, so it needs the deadline too
        self._template = self._guarded(lambda: _Environment(self._limits).from_string(source))

    def render(self, messages: list[Any], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, as transformers' apply_chat_template(..., tokenize=False) with these variables.

        Raises RequestError when the conversation is too large or the template refuses it by raise_exception;
        ArtifactError when the template fails, takes too long, or tries what the sandbox forbids.
        """
        try:
            plain = plain_data({"tools": None, "documents": None, **variables, "messages": messages})
            _measure(plain, self._limits.size)
        except (_LimitError, RecursionError) as error:
            raise RequestError(
                f"{self._name}: the conversation is too large or too deep: at most {self._limits.size} characters"
            ) from error
        plain["add_generation_prompt"] = add_generation_prompt
        return self._guarded(lambda: self._template.render(plain))

    def _guarded(self, work: Callable[[], T]) -> T:
        try:
            return _within(self._limits, work)
        except _LimitError as error:
            raise ArtifactError(f"{self._name}: stopped: the template {error}") from error
        except _RefusedError as error:
            raise RequestError(f"{self._name}: the template refuses this conversation: {error}") from error
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(f"{self._name}: line {error.lineno}: {error.message}") from error
        except Exception as error:  # a template can raise anything that Python's operators raise
            raise ArtifactError(f"{self._name}: failed with {type(error).__name__}: {error}") from error
