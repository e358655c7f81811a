"""Addcmul: input_data + value * x1 * x2, with broadcasting; value has one element."""

from .base import Call, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, refused, same_dtype
from .rule import Rule, built, math, rows, since
from .shapes import broadcast, fits


def shape(node: Call, x: TensorSpec, x1: TensorSpec, x2: TensorSpec, value: TensorSpec) -> tuple[Shape, ...]:
    fits(x.dtype == x1.dtype == x2.dtype == value.dtype, "the dtypes differ")
    return (broadcast(x.shape, broadcast(x1.shape, x2.shape)),)


def run(node: Call, input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Outputs:
    same_dtype(node, input_data, x1, x2, value)
    if value.numel() != 1:
        raise refused(node, f"value has the shape {list(value.shape)}, expected one element")
    value = value.reshape(())
    if not input_data.is_floating_point():
        return (input_data + value * x1 * x2,)
    return ((input_data.float() + value.float() * x1.float() * x2.float()).to(input_data.dtype),)


OPERATOR = Operator(
    "Addcmul",
    shape=shape,
    cost=moved,
    run=run,
    rules=(
        Rule(
            "ACM-01",
            "value is of the dtype of x: fp32 beside bf16 or fp16 is for another chip",
            "(eq in.value.dtype in.input_data.dtype)",
            "write value in the dtype of x",
            math("8.5.0", "math/addcmul/op_host/addcmul_def.cpp"),
            releases=since("8.1"),
        ),
        built("Addcmul", "addcmul", "input_data x1 x2 value 0", rows("T T T T T", "bf16 fp16 fp32 int32")),
    ),
)
