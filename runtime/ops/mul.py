"""Mul: x1 * x2, with broadcasting."""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor, same_dtype
from .rule import built, rows
from .shapes import elementwise


def run(node: Call, x1: Tensor, x2: Tensor) -> Outputs:
    same_dtype(node, x1, x2)
    return (x1 * x2,)


OPERATOR = Operator(
    "Mul",
    shape=elementwise,
    cost=moved,
    run=run,
    rules=(
        built(
            "Mul",
            "mul",
            "x1 x2 0",
            [
                "bf16 fp32 fp32",
                "fp16 fp32 fp32",
                "fp32 bf16 fp32",
                "fp32 fp16 fp32",
                *rows("T T T", "bf16 bool fp16 fp32 int32 int64 int8 uint8"),
            ],
        ),
    ),
)
