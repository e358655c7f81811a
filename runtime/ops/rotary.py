"""What RotaryMul and RotaryPositionEmbedding share: both turn the halves of the last axis against each other."""

from .base import Call, Shape, TensorSpec
from .kernel import Tensor, floating, refused, same_dtype
from .shapes import broadcast, fits


def rotary_shape(node: Call, x: TensorSpec, cos: TensorSpec, sin: TensorSpec) -> tuple[Shape, ...]:
    fits(cos.shape == sin.shape and broadcast(x.shape, cos.shape) == x.shape, "cos and sin do not fit x")
    return (x.shape,)


def rotated(node: Call, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
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
