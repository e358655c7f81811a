"""The safetensors header: read strictly, written so that the data starts 64-byte aligned.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces), then the tensors' bytes
with no gap. https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from .dtypes import BY_SAFETENSORS
from .errors import ArtifactError
from .schema import parse_json, shown

ALIGNMENT = 64
# The library takes 100 MB; 72B with all its tensors has 0.1 MB, and JSON grows twentyfold when it is parsed.
MAX_HEADER_BYTES = 8 << 20
_MAX_DIMENSIONS = 16


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies. `begin` and `end` count from the start of the file, not of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    total = BY_SAFETENSORS[dtype].bytes
    for dimension in shape:
        total *= dimension
    return total


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The length and header of a file that holds `tensors` (name, safetensors dtype, shape) in this order."""
    entries: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + _size(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _tensor(name: str, entry: object, start: int, where: str) -> TensorInfo:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ArtifactError(f"{where}: tensor {name}: expected dtype, shape and data_offsets, got {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BY_SAFETENSORS:
        raise ArtifactError(f"{where}: tensor {name}: unknown dtype {shown(dtype)}; known: {', '.join(BY_SAFETENSORS)}")
    for field, value in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
            raise ArtifactError(f"{where}: tensor {name}: {field} {shown(value)} is not a list of sizes")
    # with a 0 among them the product says nothing, and an engine still multiplies the others
    if len(shape) > _MAX_DIMENSIONS or _size(dtype, tuple(max(n, 1) for n in shape)) >= 1 << 63:
        raise ArtifactError(f"{where}: tensor {name}: shape {shown(shape)} of {dtype} is larger than any tensor")
    if len(offsets) != 2 or offsets[1] - offsets[0] != _size(dtype, tuple(shape)):
        raise ArtifactError(
            f"{where}: tensor {name}: data_offsets {shown(offsets)} do not hold shape {shown(shape)} of {dtype}, "
            f"which takes {_size(dtype, tuple(shape))} bytes"
        )
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def read_header(data: "bytes | memoryview", where: str, size: int | None = None) -> list[TensorInfo]:
    """The tensors of a file in the order of their bytes. `data` starts with the header; `size` is the whole file's.

    Raises ArtifactError naming `where` for a header that is not valid, tensors that overlap, gaps, and a file that is
    shorter or longer than its header says.
    """
    size = len(data) if size is None else size
    if size < 8:
        raise ArtifactError(f"{where}: {size} bytes, too short for a safetensors file; copy or download it again")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES or 8 + length > size:
        raise ArtifactError(
            f"{where}: the header claims {length} bytes in a file of {size}; truncated, or not a safetensors file: "
            "copy or download it again"
        )
    plain = parse_json(bytes(data[8 : 8 + length]), f"{where}: header")
    if not isinstance(plain, dict):
        raise ArtifactError(f"{where}: header is not a JSON object")
    plain.pop("__metadata__", None)
    start = 8 + length
    tensors = sorted(
        (_tensor(name, entry, start, where) for name, entry in plain.items()), key=lambda t: (t.begin, t.end)
    )
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            raise ArtifactError(
                f"{where}: tensor {tensor.name} starts at byte {tensor.begin}, expected {position}: "
                "tensors must neither overlap nor leave a gap"
            )
        position = tensor.end
    if position != size:
        state = "truncated" if position > size else "followed by bytes that no tensor uses"
        raise ArtifactError(
            f"{where}: got {size} bytes, the header describes {position}: {state}; copy or download it again"
        )
    return tensors
