"""Pack: tensors of one shape, stacked along a new axis; in arithmetic on shapes, numbers to a vector."""

from .base import SHAPE, Call, Operator, Shape, TensorSpec
from .kernel import Outputs, Tensor, axis, same_dtype
from .rule import listed, rows
from .shapes import fits, values


def shape(node: Call, *parts: TensorSpec) -> tuple[Shape, ...]:
    fits(all(part.shape == () for part in parts), "only single numbers are packed")
    return ((len(parts),),)


def packed(node: Call, *parts: TensorSpec) -> tuple[int, ...]:
    return tuple(values(part)[0] for part in parts)


def run(node: Call, *parts: Tensor) -> Outputs:
    import torch

    same_dtype(node, *parts)
    return (torch.stack(parts, axis(node, node.attributes.get("axis", 0), parts[0][None])),)


OPERATOR = Operator(
    "Pack",
    kind=SHAPE,
    shape=shape,
    values=packed,
    run=run,
    rules=(listed("Pack", "x0 0", rows("T T", "fp16 fp32 int32 int64 int8")),),
)
