"""What ReduceSum and ReduceAll share: the axes that they reduce over."""

from .base import Call, Shape, TensorSpec
from .kernel import Tensor, axis, ints, refused
from .shapes import values, without


def reduced_shape(node: Call, x: TensorSpec, axes: TensorSpec) -> tuple[Shape, ...]:
    return (without(x.shape, values(axes), node.attributes.get("keep_dims", False)),)


def reduced_axes(node: Call, x: Tensor, axes: Tensor) -> list[int]:
    reduced = [axis(node, number, x) for number in ints(node, axes)]
    if not reduced:
        # nothing and everything are both in use as its meaning
        raise refused(node, "names no axis to reduce")
    return reduced
