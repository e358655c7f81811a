"""FastGelu: x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)."""

from .base import Call, Eager, Operator, moved
from .kernel import Outputs, Tensor, floating
from .rule import listed, rows
from .shapes import same

# Values of its temporaries: few enough to stay in the cache.
_BLOCK_VALUES = 1 << 18


def run(node: Call, x: Tensor) -> Outputs:
    import torch

    floating(node, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, out in zip(x.reshape(-1).split(_BLOCK_VALUES), y.view(-1).split(_BLOCK_VALUES), strict=True):
        wide = part.float()
        out.copy_(torch.sigmoid(1.702 * wide).mul_(wide))
    return (y,)


OPERATOR = Operator(
    "FastGelu",
    shape=same,
    cost=moved,
    run=run,
    eager=Eager("npu_fast_gelu(Tensor input) -> Tensor", ("input",)),
    rules=(listed("FastGelu", "x 0", rows("T T", "bf16 fp16 fp32")),),
)
