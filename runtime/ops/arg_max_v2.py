"""ArgMaxV2: the index of the first largest value along `dimension`."""

from .base import Call, FromAttribute, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, attribute, attribute_dtype, axis, ints
from .rule import listed, rows
from .shapes import values, without


def shape(node: Call, x: TensorSpec, dimension: TensorSpec) -> tuple[Shape, ...]:
    return (without(x.shape, values(dimension)[:1], keep=False),)


def run(node: Call, x: Tensor, dimension: Tensor) -> Outputs:
    (number,) = ints(node, dimension)
    return (x.argmax(axis(node, number, x)).to(attribute_dtype(node, "dtype", attribute(node, "dtype", 9))),)


OPERATOR = Operator(
    "ArgMaxV2",
    gives=(FromAttribute("dtype", 9),),
    shape=shape,
    cost=moved,
    run=run,
    rules=(listed("ArgMaxV2", "x dimension 0", rows("T I I", "bf16 fp16 fp32 int32 int64")),),
)
