"""Transpose: known to passes and rules; no finished graph holds one."""

from .base import Operator
from .rule import listed, rows

OPERATOR = Operator(
    "Transpose",
    transposes=True,
    rules=(listed("Transpose", "x perm 0", rows("T I T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),),
)
