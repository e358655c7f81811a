"""Operators that move values: writes into a tensor, gathers, splits, shapes; and sums along axes.

Scatter and ScatterNdUpdate update their first input in place: that is their definition. The device checks no index of
theirs and writes wherever it points, so everything that it would not is refused here.
"""

from torch import Tensor

from ....artifacts.ge.graph import Node
from .kernel import Outputs, attribute, axis, dtype_name, ints, kernel, refused, required, same_dtype


@kernel
def scatter(node: Node, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    """Scatter with reduce="update": writes updates[b] into var[b] at indices[b] along `axis`, in place."""
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


@kernel
def scatter_nd_update(node: Node, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    """ScatterNdUpdate: var[indices[i]] = updates[i], in place; indices [n, 1] address rows."""
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


@kernel
def gather(node: Node, x: Tensor, indices: Tensor, dimension: Tensor) -> Outputs:
    """GatherV2: rows of x along an axis, batch_dims 0."""
    (number,) = ints(node, dimension)
    if batch_dims := attribute(node, "batch_dims", 0):
        raise refused(node, f"batch_dims={batch_dims} is not supported")
    along = axis(node, number, x)
    picked = x.index_select(along, indices.reshape(-1))
    return (picked.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :]),)


@kernel
def split_v(node: Node, x: Tensor, size_splits: Tensor, split_dim: Tensor) -> Outputs:
    """SplitV: consecutive parts of the given sizes along split_dim."""
    (number,) = ints(node, split_dim)
    return tuple(x.split(ints(node, size_splits), axis(node, number, x)))


@kernel
def reshape(node: Node, x: Tensor, shape: Tensor) -> Outputs:
    """Reshape; 0 keeps a size, -1 is inferred."""
    if attribute(node, "axis", 0) != 0 or attribute(node, "num_axes", -1) != -1:
        raise refused(node, f"only whole-shape Reshape is supported, got {node.attributes}")
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(ints(node, shape))]
    return (x.reshape(sizes),)


def _axes(node: Node, x: Tensor, tensor: Tensor) -> list[int]:
    found = [axis(node, number, x) for number in ints(node, tensor)]
    if not found:
        # nothing and everything are both in use as its meaning
        raise refused(node, "names no axis to reduce")
    return found


@kernel
def reduce_sum(node: Node, x: Tensor, axes: Tensor) -> Outputs:
    """ReduceSum over the given axes; fp16 and bf16 are accumulated in fp32."""
    wide = x.float() if x.is_floating_point() else x
    total = wide.sum(_axes(node, x, axes), keepdim=attribute(node, "keep_dims", False), dtype=wide.dtype)
    return (total.to(x.dtype),)


@kernel
def reduce_all(node: Node, x: Tensor, axes: Tensor) -> Outputs:
    """ReduceAll: whether all of x (bool) hold over the given axes."""
    if dtype_name(x) != "bool":
        raise refused(node, f"got {dtype_name(x)}, expected bool")
    return (x.all(dim=tuple(_axes(node, x, axes)), keepdim=attribute(node, "keep_dims", False)),)


@kernel
def tensor_move(node: Node, x: Tensor) -> Outputs:
    """TensorMove: a copy with memory of its own, for an in-place operator behind it."""
    return (x.clone(),)


@kernel
def identity(node: Node, x: Tensor) -> Outputs:
    """Identity: the same memory."""
    return (x,)
