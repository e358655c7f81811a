"""Arithmetic on shapes: what a graph computes of its inputs' sizes, to reshape by."""

import torch
from torch import Tensor

from ....artifacts.ge.graph import Node
from .kernel import Outputs, axis, ints, kernel, refused, same_dtype


@kernel
def shape(node: Node, x: Tensor) -> Outputs:
    """Shape: the sizes of x [rank], int32 or int64 as its attribute dtype (a ge::DataType) says."""
    number = node.attributes.get("dtype", 3)
    if number not in (3, 9):
        raise refused(node, f"attribute dtype={number} is not supported, only int32 and int64")
    return (torch.tensor(x.shape, dtype=torch.int32 if number == 3 else torch.int64),)


@kernel
def gather(node: Node, x: Tensor, indices: Tensor) -> Outputs:
    """Gather: elements of x [n] by indices of any shape."""
    numbers = ints(node, indices)
    if x.dim() != 1 or any(not 0 <= number < len(x) for number in numbers):
        raise refused(node, f"reads {numbers[:8]} of {list(x.shape)}")
    return (x.index_select(0, indices.reshape(-1).long()).reshape(indices.shape),)


@kernel
def pack(node: Node, *values: Tensor) -> Outputs:
    """Pack: tensors of one shape, stacked along a new axis."""
    same_dtype(node, *values)
    return (torch.stack(values, axis(node, node.attributes.get("axis", 0), values[0][None])),)
