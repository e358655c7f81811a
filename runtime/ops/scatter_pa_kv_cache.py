"""ScatterPaKvCache: known as a write alone; no finished graph holds one."""

from .base import Operator

OPERATOR = Operator("ScatterPaKvCache", writes=True)
