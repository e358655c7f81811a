"""Cast to dst_type (a ge::DataType)."""

from .base import Call, FromAttribute, Operator, moved
from .kernel import Outputs, Tensor, attribute_dtype, required
from .rule import listed, rows
from .shapes import same


def run(node: Call, x: Tensor) -> Outputs:
    return (x.to(attribute_dtype(node, "dst_type", required(node, "dst_type", 0))),)


OPERATOR = Operator(
    "Cast",
    gives=(FromAttribute("dst_type", None),),
    shape=same,
    cost=moved,
    run=run,
    view=True,
    rules=(
        listed(
            "Cast",
            "x 0",
            [
                *rows("bf16 T", "bool fp16 fp32 int32 int8 uint8"),
                *rows("bool T", "bf16 fp16 fp32 int32 int64 int8 uint8"),
                *rows("fp16 T", "bf16 bool fp32 int32 int64 int8 uint8"),
                *rows("fp32 T", "bf16 bool fp16 int32 int64 int8 uint8"),
                *rows("int32 T", "bf16 bool fp16 fp32 int64 int8 uint8"),
                *rows("int64 T", "bf16 bool fp16 fp32 int32 int8 uint8"),
                *rows("int8 T", "bf16 bool fp16 fp32 int32 int64 uint8"),
                *rows("uint8 T", "bf16 fp16 fp32 int32 int64 int8"),
            ],
        ),
    ),
)
