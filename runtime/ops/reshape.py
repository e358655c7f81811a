"""Reshape: 0 keeps a size, -1 is inferred."""

from math import prod

from .base import LAYOUT, Call, Operator, Shape, TensorSpec
from .kernel import Outputs, Tensor, attribute, ints, refused
from .rule import Rule, ge, listed, rows
from .shapes import fits, values


def shape(node: Call, x: TensorSpec, shape: TensorSpec) -> tuple[Shape, ...]:
    wanted = values(shape)
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    known, count = prod(size for size in sizes if size != -1), prod(x.shape)
    if -1 in sizes:
        fits(sizes.count(-1) == 1 and known > 0 and count % known == 0, f"no shape {list(wanted)} of {count} values")
        sizes[sizes.index(-1)] = count // known
    fits(prod(sizes) == count, f"no shape {list(wanted)} of {count} values")
    return (tuple(sizes),)


def run(node: Call, x: Tensor, shape: Tensor) -> Outputs:
    if attribute(node, "axis", 0) != 0 or attribute(node, "num_axes", -1) != -1:
        raise refused(node, f"only whole-shape Reshape is supported, got {node.attributes}")
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(ints(node, shape))]
    return (x.reshape(sizes),)


OPERATOR = Operator(
    "Reshape",
    kind=LAYOUT,
    shape=shape,
    run=run,
    view=True,
    unwritten={"axis": 0, "num_axes": -1},
    rules=(
        Rule(
            "RS-01",
            "the shape constant has at most one -1",
            "(le (minus1 in.shape) 1)",
            "compute the shape, or keep one free size",
            ge("9.1.0", "graph_metadef/register/shape_inference.cc"),
        ),
        listed("Reshape", "x shape 0", rows("T I T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),
    ),
)
