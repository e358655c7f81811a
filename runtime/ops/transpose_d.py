"""TransposeD: known to be counted alone; no finished graph holds one."""

from .base import Operator

OPERATOR = Operator("TransposeD", transposes=True)
