"""Scatter with reduce="update": writes updates[b] into var[b] at indices[b] along `axis`, in place.

The device checks no index and writes wherever it points, so everything that it would not is refused here.
"""

from .base import Call, Eager, Operator
from .kernel import Outputs, Tensor, attribute, axis, ints, refused, required, same_dtype
from .rule import Rule, cann_8_1, listed, rows
from .shapes import in_place
from .writes import written


def run(node: Call, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    reduce = required(node, "reduce", "update")
    if reduce != "update" or indices.dim() != 1 or len(indices) != len(var):
        raise refused(
            node,
            f"only reduce=update with one index a row is supported, got {reduce}, indices {list(indices.shape)}, "
            f"var {list(var.shape)}",
        )
    same_dtype(node, var, updates)
    along = axis(node, attribute(node, "axis", 0), var)
    if not along:
        raise refused(node, "axis 0 holds the rows, and cannot be the one that is written along")
    expected, got = list(var.shape), list(updates.shape)
    length = expected[along] = got[along] if len(got) == len(expected) else 0
    if got != expected:
        raise refused(node, f"updates {got} do not fit var {list(var.shape)} written along axis {along}")
    starts = ints(node, indices)
    for start in starts:
        if not 0 <= start <= var.shape[along] - length:
            raise refused(node, f"writes {start} to {start + length} of axis {along}, which has {var.shape[along]}")
    for row, start in enumerate(starts):
        var[row].narrow(along - 1, start, length).copy_(updates[row])
    return (var,)


OPERATOR = Operator(
    "Scatter",
    shape=in_place,
    cost=written,
    run=run,
    eager=Eager(
        "scatter_update_(Tensor(a!) input, Tensor indices, Tensor updates, int axis) -> Tensor(a!)",
        ("input", "indices", "updates"),
        ("axis",),
        fixed={"reduce": "update"},
    ),
    writes=True,
    defaults={"reduce": "update"},
    rules=(
        Rule(
            "SC-01",
            "reduce is 'update'; var and updates have one rank, 2 to 8; indices have rank 1 or 2",
            "(and (eq attr.reduce 'update') (eq in.var.rank in.updates.rank) (ge in.var.rank 2) (le in.var.rank 8) "
            "(ge in.indices.rank 1) (le in.indices.rank 2))",
            "feed the indices as int32 or int64 of rank 1 or 2",
            cann_8_1("op_impl/ai_core/tbe/impl/dynamic/scatter.py"),
        ),
        listed("Scatter", "var indices updates 0", rows("T I T T", "bf16 fp16 fp32 int32 int8")),
    ),
)
