"""Sub: known to the rules alone; no finished graph holds one."""

from .base import Operator
from .rule import listed, rows

OPERATOR = Operator(
    "Sub", rules=(listed("Sub", "x1 x2 0", rows("T T T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),)
)
