"""GatherV2: rows of x along an axis, batch_dims 0."""

from .base import Call, OpCost, Operator, Shape, TensorSpec, Work
from .kernel import Outputs, Tensor, attribute, axis, ints, refused
from .rule import LIBRARY, Rule, listed, rows, since
from .shapes import values


def shape(node: Call, x: TensorSpec, indices: TensorSpec, axis: TensorSpec) -> tuple[Shape, ...]:
    (dimension,) = values(axis)
    dimension %= len(x.shape)
    return (x.shape[:dimension] + indices.shape + x.shape[dimension + 1 :],)


def cost(node: Call, work: Work) -> OpCost:
    """Of the table, only the rows that are gathered."""
    return OpCost(0, sum(spec.bytes for spec in work.read[1:]) + 2 * work.written_bytes)


def run(node: Call, x: Tensor, indices: Tensor, dimension: Tensor) -> Outputs:
    (number,) = ints(node, dimension)
    if batch_dims := attribute(node, "batch_dims", 0):
        raise refused(node, f"batch_dims={batch_dims} is not supported")
    along = axis(node, number, x)
    picked = x.index_select(along, indices.reshape(-1))
    return (picked.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :]),)


OPERATOR = Operator(
    "GatherV2",
    shape=shape,
    cost=cost,
    run=run,
    unwritten={"is_preprocessed": False, "negative_index_support": False, "batch_dims": 0, "validate_indices": True},
    rules=(
        Rule(
            "GA-01",
            "the axis is one constant",
            "(and in.axis.const (le in.axis.rank 1))",
            "write the axis as a constant",
            LIBRARY,
            releases=since("8.1"),
        ),
        listed("GatherV2", "x indices axis 0", rows("T I I T", "bf16 bool fp16 fp32 int32 int64 int8 uint8")),
    ),
)
