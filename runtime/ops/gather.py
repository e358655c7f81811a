"""Gather: elements of x [n] by indices of any shape, as arithmetic on shapes uses it."""

from .base import SHAPE, Call, Operator, Shape, TensorSpec
from .kernel import Outputs, Tensor, ints, refused
from .rule import listed, rows
from .shapes import fits, values


def shape(node: Call, x: TensorSpec, indices: TensorSpec) -> tuple[Shape, ...]:
    fits(len(x.shape) == 1, "only vectors are gathered from")
    return (indices.shape,)


def gathered(node: Call, x: TensorSpec, indices: TensorSpec) -> tuple[int, ...]:
    return tuple(values(x)[i] for i in values(indices))


def run(node: Call, x: Tensor, indices: Tensor) -> Outputs:
    numbers = ints(node, indices)
    if x.dim() != 1 or any(not 0 <= number < len(x) for number in numbers):
        raise refused(node, f"reads {numbers[:8]} of {list(x.shape)}")
    return (x.index_select(0, indices.reshape(-1).long()).reshape(indices.shape),)


OPERATOR = Operator(
    "Gather",
    kind=SHAPE,
    shape=shape,
    values=gathered,
    run=run,
    unwritten={"is_preprocessed": False, "negative_index_support": False, "batch_dims": 0, "validate_indices": True},
    rules=(listed("Gather", "x indices 0", rows("T I T", "bf16 fp16 fp32 int32 int64 int8 uint8")),),
)
