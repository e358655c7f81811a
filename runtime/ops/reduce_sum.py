"""ReduceSum over the given axes; fp16 and bf16 are accumulated in fp32."""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor, attribute
from .reduce import reduced_axes, reduced_shape
from .rule import listed, rows


def run(node: Call, x: Tensor, axes: Tensor) -> Outputs:
    wide = x.float() if x.is_floating_point() else x
    total = wide.sum(reduced_axes(node, x, axes), keepdim=attribute(node, "keep_dims", False), dtype=wide.dtype)
    return (total.to(x.dtype),)


OPERATOR = Operator(
    "ReduceSum",
    shape=reduced_shape,
    cost=moved,
    run=run,
    unwritten={"keep_dims": False},
    rules=(listed("ReduceSum", "x axes 0", rows("T I T", "bf16 fp16 fp32 int32 int64")),),
)
