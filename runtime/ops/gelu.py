"""Gelu: known to the passes alone; no finished graph holds one."""

from .base import Operator

OPERATOR = Operator("Gelu")
