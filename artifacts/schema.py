"""Strict JSON to frozen dataclasses and back: unknown, missing and mistyped fields are errors, never defaults."""

import collections
import dataclasses
import functools
import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import ArtifactError

T = TypeVar("T")

# far above every size, and a float still holds it
_MAX_DIGITS = 100
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON; refuses duplicate keys, numbers that are not finite or have over 100 digits, halves of
    surrogate pairs, and nesting too deep for the parser.

    Raises ArtifactError naming `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise ArtifactError(f"{where}: {twice!r} appears twice in one JSON object")
        return result

    def refuse(constant: str) -> None:
        raise ArtifactError(f"{where}: {constant} is not a JSON number")

    def integer(text: str) -> int:
        if len(text) > _MAX_DIGITS:
            raise ArtifactError(f"{where}: an integer of {len(text)} digits")
        return int(text)

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ArtifactError(f"{where}: {text[:20]} is too large for a number")
        return value

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_int=integer,
            parse_float=number,
        )
        if _SURROGATE.search(data):
            # what cannot be written as UTF-8 can neither be a path nor be printed
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from error


def dump_json(value: Any) -> bytes:
    """Canonical bytes of a dataclass or plain value: two equal values give equal files."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def shown(value: Any) -> str:
    """A value from a file as an error quotes it: short, however large or deep it is."""
    return reprlib.repr(value)


class _MismatchError(Exception):
    """A value that does not fit, with the path to it, innermost step first: built only when something is wrong."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.path: list[str] = []


Decoder = Callable[[Any], Any]


def _inside(step: str, decode: Decoder, value: Any) -> Any:
    try:
        return decode(value)
    except _MismatchError as error:
        error.path.append(step)
        raise


def _mismatch(value: Any, expected: str) -> _MismatchError:
    return _MismatchError(f"got {type(value).__name__} {shown(value)}, expected {expected}")


@functools.cache
def _decoder(hint: Any) -> Decoder:
    """The function that checks and converts one value of this type; resolved once, a binding has thousands."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    expected = getattr(hint, "__name__", str(hint))
    if hint is Any:
        return lambda value: value
    if dataclasses.is_dataclass(hint):
        return _dataclass_decoder(hint)
    if origin in (types.UnionType, typing.Union):
        inner = _decoder(next(a for a in arguments if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple_decoder(arguments, expected)
    if origin is dict:
        inner = _decoder(arguments[1])

        def decode_dict(value: Any) -> Any:
            if type(value) is not dict:
                raise _mismatch(value, expected)
            return {key: _inside(f".{key}", inner, item) for key, item in value.items()}

        return decode_dict
    accepted = (int, float) if hint is float else (hint,)

    def decode_plain(value: Any) -> Any:
        # the exact type: JSON's true is no number
        if type(value) not in accepted:
            raise _mismatch(value, expected)
        return value

    return decode_plain


def _tuple_decoder(arguments: tuple[Any, ...], expected: str) -> Decoder:
    if arguments[-1] is Ellipsis:
        item = _decoder(arguments[0])

        def decode_all(value: Any) -> Any:
            if type(value) is not list:
                raise _mismatch(value, expected)
            return tuple([_inside(f"[{i}]", item, each) for i, each in enumerate(value)])

        return decode_all
    items = [_decoder(argument) for argument in arguments]

    def decode_each(value: Any) -> Any:
        if type(value) is not list or len(value) != len(items):
            raise _mismatch(value, expected)
        return tuple([_inside(f"[{i}]", items[i], each) for i, each in enumerate(value)])

    return decode_each


def _dataclass_decoder(cls: Any) -> Decoder:
    hints = typing.get_type_hints(cls)
    fields = {field.name: _decoder(hints[field.name]) for field in dataclasses.fields(cls)}

    def decode(value: Any) -> Any:
        if type(value) is not dict:
            raise _MismatchError(f"got {type(value).__name__}, expected an object")
        if value.keys() != fields.keys():
            if unknown := sorted(value.keys() - fields.keys()):
                raise _MismatchError(f"unknown field {', '.join(unknown)}")
            raise _MismatchError(f"missing field {', '.join(sorted(fields.keys() - value.keys()))}")
        return cls(**{name: _inside(f".{name}", field, value[name]) for name, field in fields.items()})

    return decode


def from_plain(cls: type[T], value: Any, where: str) -> T:
    """Build the dataclass `cls` from parsed JSON. Raises ArtifactError naming the field that is wrong."""
    try:
        result: T = _decoder(cls)(value)  # type: ignore[arg-type]  # mypy doubts that a class is hashable
    except _MismatchError as error:
        raise ArtifactError(f"{where}{''.join(reversed(error.path))}: {error}") from error
    return result
