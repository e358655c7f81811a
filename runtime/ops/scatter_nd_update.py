"""ScatterNdUpdate: var[indices[i]] = updates[i], in place; indices [n, 1] address rows.

torch_npu's operator is not in place: the graphs have a TensorMove before it. As with Scatter, what the device would
write out of place is refused.
"""

from .base import Call, Eager, Operator
from .kernel import Outputs, Tensor, ints, refused, same_dtype
from .rule import Rule, listed, nn, rows
from .shapes import in_place
from .writes import written


def run(node: Call, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    if indices.dim() != 2 or indices.shape[1] != 1:
        raise refused(node, f"indices have the shape {list(indices.shape)}, expected [n, 1]")
    same_dtype(node, var, updates)
    if updates.shape != (len(indices), *var.shape[1:]):
        raise refused(node, f"updates {list(updates.shape)} for {len(indices)} rows of {list(var.shape)}")
    outside = [row for row in ints(node, indices) if not 0 <= row < len(var)]
    if outside:
        raise refused(node, f"writes row {outside[0]} of {len(var)}")
    var[indices[:, 0].long()] = updates
    return (var,)


OPERATOR = Operator(
    "ScatterNdUpdate",
    shape=in_place,
    cost=written,
    run=run,
    eager=Eager(
        "npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor", ("input", "indices", "updates")
    ),
    writes=True,
    unwritten={"use_locking": False},
    rules=(
        Rule(
            "SC-03",
            "the last axis of indices is at most the rank of var",
            "(le in.indices.dim-1 in.var.rank)",
            "feed the indices as int32 or int64",
            nn("9.1.0", "index/scatter_nd_update/op_host/scatter_nd_update_def.cpp"),
        ),
        listed("ScatterNdUpdate", "var indices updates 0", rows("T I T T", "bf16 bool fp16 fp32 int64 int8")),
    ),
)
