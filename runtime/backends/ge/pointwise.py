"""Operators that compute one value from a few: activations, rotation, selection, arithmetic.

fp16 and bf16 are computed in fp32 and rounded once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ....artifacts.ge.graph import Node
from .kernel import Outputs, attribute, axis, dtype_name, floating, kernel, refused, same_dtype, unfed

# Values of an elementwise operator's temporaries: few enough to stay in the cache.
_BLOCK_VALUES = 1 << 18
# Above it, erf and tanh are 1 in fp32 and gelu(x) is x.
_GELU_IDENTITY = 30.0


def _rotated(node: Node, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + concat(-x2, x1) * sin, where x = concat(x1, x2) on the last axis: all 4-D, in fp32, rounded once."""
    floating(node, x)
    same_dtype(node, x, cos, sin)
    sizes = list(x.shape)
    if x.dim() != 4 or sizes[-1] % 2:
        raise refused(node, f"x has the shape {sizes}, expected 4 dimensions, the last of them even")
    if (
        cos.shape != sin.shape
        or cos.dim() != 4
        or cos.shape[-1] != sizes[-1]
        or any(table not in (1, size) for table, size in zip(cos.shape, sizes, strict=True))
    ):
        raise refused(node, f"tables {list(cos.shape)} and {list(sin.shape)} do not fit x {sizes}")
    half = sizes[-1] // 2
    wide, cos, sin = x.float(), cos.float(), sin.float()
    y = wide * cos
    y[..., :half] -= wide[..., half:] * sin[..., :half]
    y[..., half:] += wide[..., :half] * sin[..., half:]
    return y.to(x.dtype)


@kernel
def rotary_mul(node: Node, x: Tensor, r1: Tensor, r2: Tensor, *rest: Tensor | None) -> Outputs:
    """RotaryMul, half mode: y = x * r1 + concat(-x2, x1) * r2, where x = concat(x1, x2) on the last axis."""
    unfed(node, rest)
    mode = attribute(node, "rotary_mode", "half")
    if mode != "half":
        raise refused(node, f"rotary_mode {mode} is not supported, only half")
    return (_rotated(node, x, r1, r2),)


@kernel
def rotary_position_embedding(node: Node, x: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor | None) -> Outputs:
    """RotaryPositionEmbedding, mode 0 (rotate half): x [B, S, N, D], cos and sin with each size of x or 1, and D.

    One row of angles for several positions is refused: the device's tiling gives it no core.
    """
    unfed(node, rest)
    mode = attribute(node, "mode", 0)
    if mode != 0:
        raise refused(node, f"mode {mode} is not supported, only 0 (rotate half)")
    if x.dim() == 4 and x.shape[1] > 1 and cos.dim() == 4 and cos.shape[:3] == (1, 1, 1):
        raise refused(node, f"tables {list(cos.shape)} for {x.shape[1]} positions leave the output unwritten")
    return (_rotated(node, x, cos, sin),)


@kernel
def swi_glu(node: Node, x: Tensor) -> Outputs:
    """SwiGlu: silu(a) * b, where x = concat(a, b) on axis `dim`."""
    floating(node, x)
    dim = axis(node, attribute(node, "dim", -1), x)
    if x.shape[dim] % 2:
        raise refused(node, f"axis {dim} of {list(x.shape)} has no two halves")
    a, b = x.float().chunk(2, dim)
    return ((F.silu(a) * b).to(x.dtype),)


@kernel
def fast_gelu(node: Node, x: Tensor) -> Outputs:
    """FastGelu: x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)."""
    floating(node, x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, out in zip(x.reshape(-1).split(_BLOCK_VALUES), y.view(-1).split(_BLOCK_VALUES), strict=True):
        wide = part.float()
        out.copy_(torch.sigmoid(1.702 * wide).mul_(wide))
    return (y,)


@kernel
def gelu(node: Node, x: Tensor) -> Outputs:
    """GeluV2: the erf form with approximate="none" (the attribute's default), the tanh form with "tanh"."""
    floating(node, x)
    wide = x.float()
    # torch's kernel for vectors squares its input, and makes NaN of what overflows
    y = F.gelu(wide.clamp(max=_GELU_IDENTITY), approximate=attribute(node, "approximate", "none"))
    return (torch.where(wide > _GELU_IDENTITY, wide, y).to(x.dtype),)


@kernel
def add(node: Node, x1: Tensor, x2: Tensor) -> Outputs:
    """Add, with broadcasting."""
    same_dtype(node, x1, x2)
    return (x1 + x2,)


@kernel
def mul(node: Node, x1: Tensor, x2: Tensor) -> Outputs:
    """Mul, with broadcasting."""
    same_dtype(node, x1, x2)
    return (x1 * x2,)


@kernel
def addcmul(node: Node, input_data: Tensor, x1: Tensor, x2: Tensor, value: Tensor) -> Outputs:
    """Addcmul: input_data + value * x1 * x2, with broadcasting; value has one element."""
    same_dtype(node, input_data, x1, x2, value)
    if value.numel() != 1:
        raise refused(node, f"value has the shape {list(value.shape)}, expected one element")
    value = value.reshape(())
    if not input_data.is_floating_point():
        return (input_data + value * x1 * x2,)
    return ((input_data.float() + value.float() * x1.float() * x2.float()).to(input_data.dtype),)


@kernel
def is_finite(node: Node, x: Tensor) -> Outputs:
    """IsFinite: bool, false for NaN and both infinities."""
    floating(node, x)
    return (torch.isfinite(x),)


@kernel
def select_v2(node: Node, condition: Tensor, x1: Tensor, x2: Tensor) -> Outputs:
    """SelectV2: x1 where the condition (bool) holds, else x2, all three broadcast."""
    same_dtype(node, x1, x2)
    if condition.dtype != torch.bool:
        raise refused(node, f"the condition is {dtype_name(condition)}, expected bool")
    return (torch.where(condition, x1, x2),)
