"""GeluV2: the erf form with approximate="none" (the attribute's default), the tanh form with "tanh"."""

from .base import Call, Eager, Operator, moved
from .kernel import Outputs, Tensor, attribute, floating
from .rule import LIBRARY, Rule, listed, rows
from .shapes import same

# Above it, erf and tanh are 1 in fp32 and gelu(x) is x.
_IDENTITY = 30.0


def run(node: Call, x: Tensor) -> Outputs:
    import torch
    import torch.nn.functional as F

    floating(node, x)
    wide = x.float()
    # torch's kernel for vectors squares its input, and makes NaN of what overflows
    y = F.gelu(wide.clamp(max=_IDENTITY), approximate=attribute(node, "approximate", "none"))
    return (torch.where(wide > _IDENTITY, wide, y).to(x.dtype),)


OPERATOR = Operator(
    "GeluV2",
    shape=same,
    cost=moved,
    run=run,
    eager=Eager('npu_gelu(Tensor input, *, str approximate="none") -> Tensor', ("input",), ("approximate",)),
    rules=(
        Rule(
            "GELU-01",
            "approximate is 'tanh' or 'none', or absent",
            "(or (not (hasattr approximate)) (in attr.approximate tanh none))",
            "write tanh or none",
            LIBRARY,
        ),
        listed("GeluV2", "x 0", rows("T T", "bf16 fp16 fp32")),
    ),
)
