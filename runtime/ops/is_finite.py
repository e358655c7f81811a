"""IsFinite: bool, false for NaN and both infinities."""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor, floating
from .rule import listed, math, rows
from .shapes import same


def run(node: Call, x: Tensor) -> Outputs:
    floating(node, x)
    return (x.isfinite(),)


OPERATOR = Operator(
    "IsFinite",
    gives=("bool",),
    shape=same,
    cost=moved,
    run=run,
    rules=(
        listed(
            "IsFinite",
            "x 0",
            rows("T bool", "bf16 fp16 fp32"),
            math("8.5.0", "math/is_finite/op_host/is_finite_def.cpp"),
        ),
    ),
)
