"""Seeded mutations of an artifact's files: of the bytes of any file, and of the structure of those that have one."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from qwen2vl_tc.artifacts.ge.proto import message_class
from qwen2vl_tc.runtime.backends.onnx_proto import parse_model

_INTEGERS = (0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
_LITERALS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1e-999", "9" * 400, "9" * 5000, "-0", "0.5", "1e5"),
    *("true", "false", "null", '""', '"\\ud800"', '"\\u0000"', '"../../etc/passwd"', '"/dev/zero"', "{}", "[]"),
    *("[" * 90 + "]" * 90, "[" * 960 + "]" * 960, "[" * 20000 + "]" * 20000, '{"a":' * 900 + "1" + "}" * 900),
    *('"' + "x" * 5000 + '"', "[1,2,3]", "[-1]", '["a"]', '{"a": {}}', "[[[]]]", "[null]"),
)
_WORDS = ("", "x", "NetOutput", "Data", "Const", "Reshape", "\x00", "é" * 40, "a:0", "a:-1", "a:99999999999999999999")


def mutate(path: str, data: bytes, rng: random.Random) -> bytes:
    """Another content for the file `path` of an artifact; now and then the same."""
    structured: Callable[[bytes, random.Random], bytes] | None = None
    if path.endswith(".json"):
        structured = _json
    elif path.endswith((".pb", ".air")):
        structured = _ge
    elif path.endswith(".onnx"):
        structured = _onnx
    elif path.endswith(".safetensors"):
        structured = _safetensors
    if structured is not None and rng.random() < 0.6:
        return structured(data, rng)
    return _bytes(data, rng)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    kind = rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    if kind == 0 or not data:
        return data[:at]
    if kind == 1:
        return data + rng.randbytes(rng.randrange(1, 40))
    if kind == 2:
        del changed[at : at + rng.randrange(1, 200)]
    elif kind == 3:
        changed[at:at] = data[at : at + rng.randrange(1, 200)] or b"\xff"
    else:
        # most of what a file means stands at its beginning
        reach = len(data) if rng.random() < 0.5 else min(len(data), 4096)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            place = rng.randrange(reach)
            changed[place] = rng.randrange(256) if rng.random() < 0.5 else changed[place] ^ 1 << rng.randrange(8)
    return bytes(changed)


def _json(data: bytes, rng: random.Random) -> bytes:
    """One value replaced, removed, doubled or renamed. Values are swapped in as text: not all of them are JSON."""
    plain = json.loads(data)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            collect(value[key])

    collect(plain)
    if not places:
        return rng.choice(_LITERALS).encode()
    marker = "QVTC-MUTATION"
    holder, key = rng.choice(places)
    value = holder[key]
    kind = rng.randrange(8)
    text = rng.choice(_LITERALS)
    if kind == 0:
        del holder[key]
        return json.dumps(plain).encode()
    if kind == 1 and isinstance(holder, dict):
        holder[rng.choice(_WORDS)] = holder.pop(key)
        return json.dumps(plain).encode()
    if kind == 2 and isinstance(holder, dict):
        text = f"{json.dumps(value)}, {json.dumps(key)}: {json.dumps(value)}"
    elif kind == 3 and isinstance(holder, list):
        text = ", ".join([json.dumps(value)] * rng.choice((2, 3, 500)))
    elif kind == 4 or type(value) is int:
        near = (value if type(value) is int else 1) + rng.choice((-1, 1))
        text = str(rng.choice(_INTEGERS) if rng.random() < 0.7 else near)
    elif kind == 5 and isinstance(value, str):
        other = rng.choice(places)
        text = json.dumps(other[0][other[1]])
    elif kind == 6 and isinstance(value, str) and value:
        characters = list(value)
        characters[rng.randrange(len(value))] = chr(rng.choice((0, 34, 47, 46, 92, 123, 125, 37, 0x2028, 65, 0x10FFFF)))
        text = json.dumps("".join(characters))
    holder[key] = marker
    return json.dumps(plain).replace(json.dumps(marker), text, 1).encode("utf-8", "surrogatepass")


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = _json(data[8 : 8 + length], rng)
    claimed = len(header)
    if rng.random() < 0.1:
        claimed = rng.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1))
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def _ge(data: bytes, rng: random.Random) -> bytes:
    """One field of one message somewhere in a GE graph."""
    model = message_class("ModelDef").FromString(data)
    message = model
    if model.graph and rng.random() < 0.97:
        graph = model.graph[0]
        message = rng.choice(graph.op) if graph.op and rng.random() < 0.95 else graph
    return _proto(model, message, rng)


def _onnx(data: bytes, rng: random.Random) -> bytes:
    """One field of one message somewhere in an ONNX model: mostly of its nodes and tensors."""
    model = parse_model(data, "clean")
    graph = model.graph
    message = rng.choice((model, graph, *[graph.node] * 5, *[graph.initializer] * 3, graph.input, graph.output))
    return _proto(model, message if hasattr(message, "DESCRIPTOR") else rng.choice(message), rng)


def _proto(model: Any, message: Any, rng: random.Random) -> bytes:
    """`model` with one field of `message`, or of one inside it, changed."""
    for _ in range(12):
        fields = message.DESCRIPTOR.fields
        field = rng.choice(fields)
        value = getattr(message, field.name)
        repeated = field.is_repeated
        if field.message_type and field.message_type.GetOptions().map_entry:
            if not value:
                continue
            key = rng.choice(sorted(value))
            if rng.random() < 0.2:
                del value[key]
                break
            message = value[key]
            continue
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if repeated:
                if not value:
                    continue
                if rng.random() < 0.2:
                    _shuffle(value, rng)
                    break
                message = rng.choice(value)
            elif message.HasField(field.name):
                message = value
            continue
        if repeated:
            if value and rng.random() < 0.7:
                index = rng.randrange(len(value))
                if rng.random() < 0.25:
                    del value[index]
                else:
                    value[index] = _scalar(field, value[index], list(value), rng)
            else:
                value.append(_scalar(field, None, list(value), rng))
        else:
            setattr(message, field.name, _scalar(field, value, [], rng))
        break
    return bytes(model.SerializeToString(deterministic=True))


def _shuffle(values: Any, rng: random.Random) -> None:
    index = rng.randrange(len(values))
    if rng.random() < 0.5:
        del values[index]
    else:
        values.add().CopyFrom(values[index])


def _scalar(field: Any, value: Any, others: list[Any], rng: random.Random) -> Any:
    if field.type == FieldDescriptor.TYPE_STRING:
        words = [*_WORDS, *others]
        if value:
            words += [value[:-1], value + "0", f"{value.rpartition(':')[0]}:{rng.choice((-9, -1, 1, 5, 10**25))}"]
        return rng.choice(words).replace("\x00", "\x01") if rng.random() < 0.5 else rng.choice(words)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _bytes(value or b"", rng)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return not value
    if field.type == FieldDescriptor.TYPE_FLOAT:
        return rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-40))
    bits, signed = (32, True) if field.type == FieldDescriptor.TYPE_INT32 else (64, True)
    if field.type == FieldDescriptor.TYPE_UINT32:
        bits, signed = 32, False
    number = rng.choice(_INTEGERS) if rng.random() < 0.6 else int(value or 0) + rng.choice((-2, -1, 1, 2))
    number %= 2**bits
    return number - 2**bits if signed and number >= 2 ** (bits - 1) else number
