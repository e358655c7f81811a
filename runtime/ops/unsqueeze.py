"""Unsqueeze: known to passes and rules; no finished graph holds one."""

from .base import LAYOUT, Operator
from .rule import listed, rows

OPERATOR = Operator(
    "Unsqueeze",
    kind=LAYOUT,
    view=True,
    rules=(listed("Unsqueeze", "x 0", rows("T T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),),
)
