"""SplitV: consecutive parts of the given sizes along split_dim."""

from .base import Call, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, axis, ints
from .rule import LIBRARY, Rule, listed, rows, since
from .shapes import fits, values


def shape(node: Call, x: TensorSpec, size_splits: TensorSpec, split_dim: TensorSpec) -> tuple[Shape, ...]:
    sizes, axis = values(size_splits), values(split_dim)[0] % len(x.shape)
    fits(sum(sizes) == x.shape[axis], f"the parts {list(sizes)} do not add up to axis {axis}")
    return tuple((*x.shape[:axis], size, *x.shape[axis + 1 :]) for size in sizes)


def run(node: Call, x: Tensor, size_splits: Tensor, split_dim: Tensor) -> Outputs:
    (number,) = ints(node, split_dim)
    return tuple(x.split(ints(node, size_splits), axis(node, number, x)))


OPERATOR = Operator(
    "SplitV",
    shape=shape,
    cost=moved,
    run=run,
    view=True,
    rules=(
        Rule(
            "SP-01",
            "the sizes and the axis are constants",
            "(and in.size_splits.const in.split_dim.const)",
            "write both as constants",
            LIBRARY,
            releases=since("8.1"),
        ),
        listed("SplitV", "x size_splits split_dim 0", rows("T I I T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),
    ),
)
