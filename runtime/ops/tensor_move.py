"""TensorMove: a copy with memory of its own, for an in-place operator behind it."""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor
from .rule import listed, rows
from .shapes import same


def run(node: Call, x: Tensor) -> Outputs:
    return (x.clone(),)


OPERATOR = Operator(
    "TensorMove",
    shape=same,
    cost=moved,
    run=run,
    copy=True,
    rules=(listed("TensorMove", "x 0", rows("T T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),),
)
