"""Each row of the table of dtypes against the packages that number and name them."""

import ml_dtypes
import numpy as np
import pytest
import torch

from qwen2vl_tc.artifacts.dtypes import BY_GE, BY_ONNX, BY_PROTO, BY_SAFETENSORS, BY_TORCH, DTYPES, Dtype, onnx_number
from qwen2vl_tc.runtime.dtypes import numpy_dtype, torch_dtype

OF_GRAPHS = list(BY_PROTO.values())


@pytest.mark.parametrize("row", OF_GRAPHS, ids=lambda row: row.name)
def test_torch_and_numpy_have_it_in_as_many_bytes(row: Dtype) -> None:
    assert torch_dtype(row.name).itemsize == numpy_dtype(row.name).itemsize == row.bytes
    assert torch.zeros(1, dtype=torch_dtype(row.name)).dtype == getattr(torch, str(row.torch))
    assert BY_TORCH[str(torch_dtype(row.name)).removeprefix("torch.")] is row
    assert numpy_dtype("bf16") == np.dtype(ml_dtypes.bfloat16)


def test_the_numbers_are_those_of_torchair_and_of_onnx() -> None:
    from qwen2vl_tc.exporters.torchair.device import open_device

    onnx = pytest.importorskip("onnx")
    open_device("Ascend910B2")
    from torchair._ge_concrete_graph.ge_ir_pb2 import DataType as Proto
    from torchair.ge._ge_graph import DataType as Ge

    names = {"fp32": "FLOAT", "fp16": "FLOAT16"}
    for row in OF_GRAPHS:
        name = names.get(row.name, row.name.upper())
        assert Proto.Value(f"DT_{name}") == row.proto
        assert getattr(Ge, f"DT_{name}") == row.ge
    for number, row in BY_ONNX.items():
        assert onnx.TensorProto.DataType.Value(names.get(row.name, row.name.upper())) == number


def test_no_number_and_no_name_stands_for_two() -> None:
    rows = DTYPES.values()
    for table, column in ((BY_GE, "ge"), (BY_PROTO, "proto"), (BY_ONNX, "onnx"), (BY_TORCH, "torch")):
        assert len(table) == sum(getattr(row, column) is not None for row in rows)
    assert len(BY_SAFETENSORS) == len(DTYPES) - 1, "packed int4 has no name there"


def test_a_dtype_that_has_no_number_there_is_an_error() -> None:
    with pytest.raises(KeyError, match="bf16"):
        onnx_number("bf16")
