"""Strict JSON to frozen dataclasses and back: unknown, missing and mistyped fields are errors, never defaults."""

import collections
import dataclasses
import functools
import json
import types
import typing
from typing import Any, TypeVar

from .errors import ArtifactError

T = TypeVar("T")


def parse_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON; refuses duplicate keys, NaN and Infinity, and nesting too deep for the parser.

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

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not valid JSON: {error}") from error


def dump_json(value: Any) -> bytes:
    """Canonical bytes of a dataclass or plain value: two equal values give equal files."""
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return (json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


@functools.cache
def _fields(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))


def _decode(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _decode(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_decode(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    elif origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif (hint is float and type(value) in (int, float)) or (isinstance(hint, type) and type(value) is hint):
        return value
    raise ArtifactError(f"{where}: got {type(value).__name__} {str(value)[:60]!r}, expected {_name(hint)}")


def from_plain(cls: type[T], value: Any, where: str) -> T:
    """Build the dataclass `cls` from parsed JSON. Raises ArtifactError naming the field that is wrong."""
    if not isinstance(value, dict):
        raise ArtifactError(f"{where}: got {type(value).__name__}, expected an object")
    hints = _fields(cls)  # type: ignore[arg-type]  # mypy doubts that a class is hashable
    if unknown := sorted(value.keys() - hints.keys()):
        raise ArtifactError(f"{where}: unknown field {', '.join(unknown)}")
    if missing := sorted(hints.keys() - value.keys()):
        raise ArtifactError(f"{where}: missing field {', '.join(missing)}")
    return cls(**{name: _decode(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
