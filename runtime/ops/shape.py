"""Shape: the sizes of x [rank], int32 or int64 as its attribute dtype (a ge::DataType) says."""

from .base import SHAPE, Call, FromAttribute, Operator, Shape, TensorSpec
from .kernel import Outputs, Tensor, attribute_dtype, refused
from .rule import listed, rows


def shape(node: Call, x: TensorSpec) -> tuple[Shape, ...]:
    return ((len(x.shape),),)


def sizes(node: Call, x: TensorSpec) -> tuple[int, ...]:
    return x.shape


def run(node: Call, x: Tensor) -> Outputs:
    import torch

    number = node.attributes.get("dtype", 3)
    if number not in (3, 9):
        raise refused(node, f"attribute dtype={number} is not supported, only int32 and int64")
    return (torch.tensor(x.shape, dtype=attribute_dtype(node, "dtype", number)),)


OPERATOR = Operator(
    "Shape",
    kind=SHAPE,
    gives=(FromAttribute("dtype", 3),),
    shape=shape,
    values=sizes,
    run=run,
    rules=(listed("Shape", "x 0", rows("T I", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),),
)
