"""SelectV2: x1 where the condition (bool) holds, else x2, all three broadcast."""

from .base import Call, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, dtype_name, refused, same_dtype
from .rule import Rule, listed, math, rows, since
from .shapes import broadcast, fits


def shape(node: Call, condition: TensorSpec, x1: TensorSpec, x2: TensorSpec) -> tuple[Shape, ...]:
    fits(condition.dtype == "bool" and x1.dtype == x2.dtype, "the dtypes differ")
    return (broadcast(condition.shape, broadcast(x1.shape, x2.shape)),)


def run(node: Call, condition: Tensor, x1: Tensor, x2: Tensor) -> Outputs:
    same_dtype(node, x1, x2)
    if dtype_name(condition) != "bool":
        raise refused(node, f"the condition is {dtype_name(condition)}, expected bool")
    return (x1.where(condition, x2),)


OPERATOR = Operator(
    "SelectV2",
    gives=(1,),
    shape=shape,
    cost=moved,
    run=run,
    rules=(
        Rule(
            "SEL-01",
            "the condition is bool, and the operands broadcast",
            "(and (eq in.condition.dtype 'bool') (le in.condition.rank 8))",
            "feed a bool condition",
            math("8.5.0", "math/select/op_api/select.cpp"),
            releases=since("8.1"),
        ),
        listed(
            "SelectV2",
            "condition then else 0",
            rows("bool T T T", "bf16 fp16 fp32 int32 int64 int8 uint8"),
            math("8.5.0", "math/select/op_api/select.cpp"),
        ),
    ),
)
