"""The dtypes, a row each: whatever names, numbers or measures one reads it here.

`runtime.dtypes` gives torch's and numpy's objects of a row.
"""

from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Dtype:
    """One dtype under the artifact's name of it; None where no file of ours has it.

    safetensors, numpy and torch: its names there. proto: ge.proto.DataType, as descriptors and constants of a GE graph
    number it. ge: ge::DataType of GE's C++ headers, as attributes such as Cast's dst_type do. onnx:
    onnx.TensorProto.DataType.
    """

    name: str
    bits: int
    safetensors: str | None = None
    numpy: str | None = None
    torch: str | None = None
    proto: int | None = None
    ge: int | None = None
    onnx: int | None = None

    @property
    def bytes(self) -> int:
        """Of one value; only ONNX models pack several into one."""
        return self.bits // 8


DTYPES = {
    row.name: row
    for row in (
        Dtype("fp32", 32, "F32", "float32", "float32", proto=1, ge=0, onnx=1),
        Dtype("fp16", 16, "F16", "float16", "float16", proto=2, ge=1, onnx=10),
        Dtype("bf16", 16, "BF16", "bfloat16", "bfloat16", proto=27, ge=27),
        Dtype("int8", 8, "I8", "int8", "int8", proto=3, ge=2, onnx=3),
        Dtype("uint8", 8, "U8", "uint8", "uint8", proto=4, ge=4, onnx=2),
        Dtype("int32", 32, "I32", "int32", "int32", proto=7, ge=3, onnx=6),
        Dtype("int64", 64, "I64", "int64", "int64", proto=8, ge=9, onnx=7),
        Dtype("bool", 8, "BOOL", "bool", "bool", proto=11, ge=12),
        # int4 weights, packed
        Dtype("uint4", 4, onnx=21),
        # of checkpoints, whose headers are read before they are refused
        Dtype("fp64", 64, "F64"),
        Dtype("uint64", 64, "U64"),
        Dtype("uint32", 32, "U32"),
        Dtype("int16", 16, "I16"),
        Dtype("uint16", 16, "U16"),
        Dtype("fp8_e4m3", 8, "F8_E4M3"),
        Dtype("fp8_e5m2", 8, "F8_E5M2"),
    )
}
BY_SAFETENSORS = {row.safetensors: row for row in DTYPES.values() if row.safetensors}
BY_TORCH = {row.torch: row for row in DTYPES.values() if row.torch}
# those of GE graphs
BY_PROTO = {row.proto: row for row in DTYPES.values() if row.proto is not None}
BY_GE = {row.ge: row for row in DTYPES.values() if row.ge is not None}
# those of our ONNX models
BY_ONNX = {row.onnx: row for row in DTYPES.values() if row.onnx is not None}


def stored_name(dtype: str) -> str:
    """The safetensors name of a dtype that safetensors files hold. Raises KeyError for another."""
    return _of(dtype, DTYPES[dtype].safetensors)


def onnx_number(dtype: str) -> int:
    """The number of a dtype of our ONNX models. Raises KeyError for another."""
    return _of(dtype, DTYPES[dtype].onnx)


def ge_number(dtype: str) -> int:
    """The ge::DataType of a dtype of GE graphs. Raises KeyError for another."""
    return _of(dtype, DTYPES[dtype].ge)


def proto_number(dtype: str) -> int:
    """The ge.proto.DataType of a dtype of GE graphs. Raises KeyError for another."""
    return _of(dtype, DTYPES[dtype].proto)


def torch_name(dtype: str) -> str:
    """torch's, and config.json's, name of a dtype. Raises KeyError for one that it does not have."""
    return _of(dtype, DTYPES[dtype].torch)


def numpy_name(dtype: str) -> str:
    """numpy's, or ml_dtypes', name of a dtype. Raises KeyError for one that they do not have."""
    return _of(dtype, DTYPES[dtype].numpy)


def _of(dtype: str, column: T | None) -> T:
    if column is None:
        raise KeyError(dtype)
    return column
