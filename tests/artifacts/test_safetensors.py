"""The header, against the safetensors library and against hostile files."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.safetensors import ALIGNMENT, header_bytes, read_header


def file_of(entries: Any, data: bytes = b"", padding: int = 0) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    text += b" " * padding
    return struct.pack("<Q", len(text)) + text + data


def test_what_the_library_writes_is_read() -> None:
    arrays: dict[str, np.ndarray] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.ones((), np.float16),
        "c": np.ones(0, np.int8),
    }
    data = save(arrays, metadata={"format": "pt"})
    infos = read_header(data, "file")
    assert {i.name: i.shape for i in infos} == {name: array.shape for name, array in arrays.items()}
    for info in infos:
        assert data[info.begin : info.end] == arrays[info.name].tobytes()


def test_what_is_written_is_aligned_and_read_by_the_library() -> None:
    header = header_bytes([("x", "BF16", (3,)), ('quote"é', "F32", (1, 2))])
    assert len(header) % ALIGNMENT == 0
    loaded = dict(deserialize(header + bytes(range(14))))
    assert loaded["x"]["shape"] == [3] and bytes(loaded["x"]["data"]) == bytes(range(6))
    assert loaded['quote"é']["dtype"] == "F32"


def entry(begin: int, end: int, dtype: str = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HOSTILE = {
    "too short": (b"\0" * 7, "too short"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "header claims"),
    "header is a list": (file_of([]), "not a JSON object"),
    "header is no JSON": (file_of(b"{"), "not valid JSON"),
    "header is not UTF-8": (file_of(b'{"\xff": 1}'), "not valid JSON"),
    "name twice": (file_of(b'{"a": 1, "a": 2}'), "'a' appears twice"),
    "overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "neither overlap nor leave a gap"),
    "gap": (file_of({"a": entry(4, 8)}, bytes(8)), "neither overlap nor leave a gap"),
    "past the end": (file_of({"a": entry(0, 8)}, bytes(4)), "truncated"),
    "unused tail": (file_of({"a": entry(0, 8)}, bytes(12)), "no tensor uses"),
    "size and shape differ": (file_of({"a": entry(0, 8, shape=[3])}, bytes(8)), "which takes 12 bytes"),
    "negative size": (file_of({"a": entry(0, 8, shape=[-1, -2])}, bytes(8)), "not a list of sizes"),
    "boolean size": (file_of({"a": entry(0, 4, shape=[True])}, bytes(4)), "not a list of sizes"),
    "end before begin": (file_of({"a": entry(8, 0, shape=[0])}, b""), "do not hold shape"),
    "unknown dtype": (file_of({"a": entry(0, 4, dtype="F31")}, bytes(4)), "unknown dtype 'F31'"),
    "dtype is a list": (file_of({"a": {**entry(0, 4), "dtype": []}}, bytes(4)), "unknown dtype"),
    "extra field": (file_of({"a": {**entry(0, 4), "run": "me"}}, bytes(4)), "expected dtype, shape and data_offsets"),
    "huge shape": (file_of({"a": entry(0, 4, shape=[1 << 62] * 30)}, bytes(4)), "larger than any tensor"),
    "huge shape beside a zero": (file_of({"a": entry(0, 0, shape=[0, 1 << 62, 4])}), "larger than any tensor"),
    "a million dimensions": (file_of({"a": entry(0, 4, shape=[1] * 1000000)}, bytes(4)), "larger than any tensor"),
    "deep header": (file_of(b'{"a":' + b"[" * 950 + b"]" * 950 + b"}"), "expected dtype, shape|not valid JSON"),
    "half a surrogate pair": (file_of(b'{"\\ud800": 1}'), "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_one_clear_error(case: str) -> None:
    data, message = HOSTILE[case]
    with pytest.raises(ArtifactError, match=message):
        read_header(data, "file")


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda text: file_of(b"{" + text + b"}")))
def test_no_bytes_cause_another_error(data: bytes) -> None:
    try:
        read_header(data, "file")
    except ArtifactError:
        with pytest.raises(SafetensorError):
            deserialize(data)


def test_the_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    data = file_of({"a": entry(0, 4)}, b"abcd", padding=5)
    (info,) = read_header(data[:-4], "file", size=len(data))
    assert data[info.begin : info.end] == b"abcd"
