"""What operators that write in place share."""

from .base import Call, OpCost, Work


def written(node: Call, work: Work) -> OpCost:
    """Of what is written into, only as much as is written."""
    return OpCost(0, sum(spec.bytes for spec in work.read[1:]) + work.read[-1].bytes)
