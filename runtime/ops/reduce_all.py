"""ReduceAll: whether all of x (bool) hold over the given axes."""

from .base import Call, Operator, moved
from .kernel import Outputs, Tensor, attribute, dtype_name, refused
from .reduce import reduced_axes, reduced_shape
from .rule import Rule, listed, math, rows, since


def run(node: Call, x: Tensor, axes: Tensor) -> Outputs:
    if dtype_name(x) != "bool":
        raise refused(node, f"got {dtype_name(x)}, expected bool")
    return (x.all(dim=tuple(reduced_axes(node, x, axes)), keepdim=attribute(node, "keep_dims", False)),)


OPERATOR = Operator(
    "ReduceAll",
    shape=reduced_shape,
    cost=moved,
    run=run,
    unwritten={"keep_dims": False},
    rules=(
        Rule(
            "RA-01",
            "x is bool; axes are int32 or int64 of rank 0 or 1",
            "(le in.axes.rank 1)",
            "write the axes as one list",
            math("8.5.0", "math/reduce_all/op_host/op_api/reduce_all.cpp"),
            releases=since("8.1"),
        ),
        listed("ReduceAll", "x axes 0", rows("T I T", "bool"), math("9.0.0", "math/reduce_all/op_api/reduce_all.cpp")),
    ),
)
