"""What one run of a GE graph costs: live operators by kind, and the bytes that its device operators read and write.

The bytes follow from shapes alone. The graph runs once on meta tensors, which have a shape and no memory, through the
reference backend's own operators; the few that look at values have a shape rule here. Values that decide shapes
(constants, lengths) are real.

Counting: every device operator reads its inputs and writes its outputs once, with four exceptions in which it touches
only a part: Scatter and ScatterNdUpdate touch the rows that they write, GatherV2 the rows that it picks, attention the
cache up to the lengths that it is given, StridedSlice what it cuts out. The numbers are traffic as emitted: an upper
bound of what reaches device memory, since caches on the chip and GE's own fusions take some away.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from qwen2vl_tc.artifacts.binding import LENGTHS, Binding
from qwen2vl_tc.artifacts.ge_ops import ATTENTIONS, count_kinds, live_ops, op_kind
from qwen2vl_tc.runtime.backends.ge.executor import _constant_tensor
from qwen2vl_tc.runtime.backends.ge.graph import INPUT_TYPES, GeGraph, Node, read_graph
from qwen2vl_tc.runtime.backends.ge.operators import OPERATORS, TORCH_DTYPES
from qwen2vl_tc.toolchain.inspect import count_graph_ops
from qwen2vl_tc.toolchain.shapes import graph_ops

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sizes:
    """One run: patches of one picture, tokens of the prompt, length of the cache with the new token."""

    patches: int = 1872
    merge: int = 4
    tokens: int = 507
    length: int = 1368

    def of(self, graph: str, name: str) -> int:
        """What a dynamic dimension of the graph's input `name` is."""
        merged = self.patches // self.merge
        if graph == "visual":
            return 1 if name == "segment_ends" else self.patches
        if graph == "prefill":
            return merged if name in ("image_embeds", "image_index") else self.tokens
        return self.length - 1

    def lengths(self, graph: str) -> int:
        return {"visual": self.patches, "prefill": self.tokens}.get(graph, self.length)


@dataclass(frozen=True)
class Cost:
    """One run of one graph. file_ops, file_device: operators in the file, dead ones included; all else is live only."""

    device: int
    per_layer: int | None
    transpose_weight: int
    shape: int
    layout: int
    file_ops: int
    file_device: int
    bytes: int
    matmul_flops: int
    largest_bytes: int
    by_type: dict[str, int]


def _bytes(tensors: Sequence[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


def _lifted(function: Callable[..., Any]) -> Callable[..., Outputs]:
    """An elementwise operator: a constant beside an activation has a shape of its own that takes part."""

    def run(node: Node, *inputs: Tensor) -> Outputs:
        mixed = any(x.device.type == "meta" for x in inputs)
        return (function(*(x.to("meta") if mixed else x for x in inputs)),)

    return run


def _like_first(node: Node, x: Tensor, *rest: Tensor | None) -> Outputs:
    return (x,)


def _attention(node: Node, q: Tensor, *rest: Tensor | None) -> Outputs:
    """Attention gives what its query's shape is; FusedInferAttentionScore also a placeholder for softmax_lse."""
    return torch.empty_like(q), _meta((1,), torch.float32)


def _strided_slice(node: Node, x: Tensor, begin: Tensor, end: Tensor, axes: Tensor | None, strides: Tensor) -> Outputs:
    index = [slice(None)] * x.dim()
    for axis, first, last, step in zip(_ints(axes), _ints(begin), _ints(end), _ints(strides), strict=True):  # type: ignore[arg-type]
        index[axis] = slice(first, last, step)
    return (x[tuple(index)],)


def _concat(node: Node, *inputs: Tensor) -> Outputs:
    return (torch.cat(inputs[:-1], _ints(inputs[-1])[0]),)


def _concat_d(node: Node, *inputs: Tensor) -> Outputs:
    return (torch.cat(inputs, node.attributes["concat_dim"]),)


def _gather(node: Node, x: Tensor, indices: Tensor, axis: Tensor | None = None) -> Outputs:
    picked = x.index_select(0 if axis is None else _ints(axis)[0], indices.reshape(-1))
    return (picked.reshape((*indices.shape, *x.shape[1:])),)


def _split(node: Node, x: Tensor, sizes: Tensor, dim: Tensor) -> Outputs:
    axis, parts = _ints(dim)[0], _ints(sizes)
    rest = x.shape[axis] - sum(size for size in parts if size != -1)
    return x.split([rest if size == -1 else size for size in parts], axis)


def _mat_mul_v2(node: Node, x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: None) -> Outputs:
    return OPERATORS["MatMul"](node, x1, x2, bias)


def _pack(node: Node, *inputs: Tensor) -> Outputs:
    return (torch.stack([x.reshape(()) for x in inputs]) if inputs[0].dim() == 0 else torch.stack(inputs),)


def _batch_matmul(node: Node, a: Tensor, b: Tensor, *rest: None) -> Outputs:
    a = a.transpose(-1, -2) if node.attributes.get("adj_x1") else a
    b = b.transpose(-1, -2) if node.attributes.get("adj_x2") else b
    return (a @ b,)


def _broadcast_to(node: Node, x: Tensor, shape: Tensor) -> Outputs:
    return (torch.empty_like(x).expand(_ints(shape)).contiguous(),)


def _reduce_mean(node: Node, x: Tensor, axes: Tensor) -> Outputs:
    return (x.mean(_ints(axes), keepdim=bool(node.attributes["keep_dims"])),)


def _tile(node: Node, x: Tensor, multiples: Tensor) -> Outputs:
    return (x.repeat(_ints(multiples)),)


def _transpose(node: Node, x: Tensor, order: Tensor) -> Outputs:
    return (x.permute(_ints(order)).contiguous(),)


def _scatter_pa(
    node: Node, key: Tensor, keys: Tensor, slots: Tensor, value: Tensor, values: Tensor, *_: Any
) -> Outputs:
    return keys, values


def _unsqueeze(node: Node, x: Tensor) -> Outputs:
    for axis in sorted(node.attributes["axes"] if isinstance(node.attributes["axes"], list) else [0]):
        x = x.unsqueeze(axis)
    return (x,)


def _squeeze(node: Node, x: Tensor) -> Outputs:
    axes = node.attributes.get("axis")
    return (x.squeeze(tuple(axes)) if axes else x.squeeze(),)


# Beside the reference backend's operators: those that look at values, and those that only undone variants emit.
RULES: dict[str, Callable[..., Outputs]] = {
    **dict.fromkeys(ATTENTIONS, _attention),
    **dict.fromkeys(("Scatter", "ScatterNdUpdate", "Identity", "Swish", "Sigmoid", "Neg", "Rsqrt"), _like_first),
    **dict.fromkeys(("SoftmaxV2", "Square", "Exp", "Cos", "Sin", "Muls", "Adds"), _like_first),
    "Add": _lifted(torch.add),
    "Mul": _lifted(torch.mul),
    "Sub": _lifted(torch.sub),
    "RealDiv": _lifted(torch.div),
    "Pow": _lifted(torch.pow),
    "ApplyRotaryPosEmb": lambda node, q, k, *rest: (q, k),
    "MaskedFill": _lifted(lambda x, mask, value: torch.empty_like(x)),
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "BroadcastTo": _broadcast_to,
    "ConcatV2": _concat,
    "ConcatD": _concat_d,
    "Cmo": lambda node, *inputs: (),
    "FFN": lambda node, x, *rest: (x,),
    "Gather": _gather,
    "MatMulV2": _mat_mul_v2,
    "Pack": _pack,
    "ReduceMean": _reduce_mean,
    "ScatterPaKvCache": _scatter_pa,
    "Shape": lambda node, x: (torch.tensor(x.shape, dtype=torch.int64),),
    "SplitV": _split,
    "Squeeze": _squeeze,
    "StridedSlice": _strided_slice,
    "StridedSliceV2": _strided_slice,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
_LENGTHS_INPUT = {"FusedInferAttentionScore": 6, "IncreFlashAttention": 5}


def _traffic(node: Node, inputs: Sequence[Tensor | None], outputs: Outputs) -> int:
    """Bytes that one device operator reads and writes."""
    if node.op in ("Scatter", "ScatterNdUpdate"):
        return _bytes([inputs[1]]) + 2 * _bytes([inputs[2]])
    if node.op == "ScatterPaKvCache":
        return 2 * _bytes([inputs[0], inputs[3]]) + _bytes([inputs[2]])
    if node.op == "Cmo":
        return 0
    if node.op == "GatherV2":
        return _bytes([inputs[1]]) + 2 * _bytes(outputs)
    if node.op.startswith("StridedSlice"):
        return 2 * _bytes(outputs)
    position = _LENGTHS_INPUT.get(node.op)
    lengths = inputs[position] if position is not None else None
    if lengths is not None and node.attributes["input_layout"] == "BSH":
        cache = inputs[1]
        row = prod(cache.shape[2:]) * cache.element_size()  # type: ignore[union-attr]
        others = [x for i, x in enumerate(inputs) if i not in (1, 2)]
        return 2 * sum(_ints(lengths)) * row + _bytes(others) + _bytes(outputs)
    return _bytes(inputs) + _bytes(outputs)


def measure(model: Any, binding: Binding, sizes: Sizes) -> Cost:
    """Count and cost a ge.proto.ModelDef whose graph's first name part is visual, prefill or decode.

    Raises KeyError for an operator without a rule, and RuntimeError where shapes do not fit.
    """
    graph = read_graph(model.SerializeToString(), binding.graph)
    counts = count_graph_ops(graph, binding)
    file = count_kinds(node.op for node in graph.nodes)
    traffic, flops, largest = _run(graph, binding, sizes)
    return Cost(
        device=counts.device,
        per_layer=counts.per_layer,
        transpose_weight=counts.transpose_weight,
        shape=counts.shape,
        layout=counts.layout,
        file_ops=file["total"],
        file_device=file["device"],
        bytes=traffic,
        matmul_flops=flops,
        largest_bytes=largest,
        by_type=counts.by_type,
    )


def _inputs(graph: GeGraph, binding: Binding, sizes: Sizes) -> dict[str, Outputs]:
    found: dict[str, Outputs] = {}
    for node, bound in zip(graph.inputs, binding.inputs, strict=True):
        if bound.kind == LENGTHS:
            found[node.name] = (torch.tensor([sizes.lengths(binding.graph)]),)
        else:
            shape = [sizes.of(binding.graph, bound.name) if size == -1 else size for size in bound.shape]
            found[node.name] = (_meta(shape, TORCH_DTYPES[bound.dtype]),)
    return found


def _run(graph: GeGraph, binding: Binding, sizes: Sizes) -> tuple[int, int, int]:
    """Bytes, floating-point operations of the matrix products, and the bytes of the largest tensor but weights."""
    ops = graph_ops(graph)
    live = live_ops(ops)
    values: dict[str, Outputs] = _inputs(graph, binding, sizes)
    fixed = {node.name for node, bound in zip(graph.inputs, binding.inputs, strict=True) if -1 not in bound.shape}
    traffic = flops = 0
    largest = max((_bytes(value) for name, value in values.items() if name not in fixed), default=0)
    for node in graph.nodes:
        if node.name not in live or node.op in (*INPUT_TYPES, "NetOutput"):
            continue
        if node.constant is not None:
            values[node.name] = (_constant_tensor(node),)
            continue
        arguments = [values[e[0]][e[1]] if e else None for e in node.inputs]
        outputs = _outputs(node, arguments)
        values[node.name] = outputs
        if op_kind(node.op) == "device":
            traffic += _traffic(node, arguments, outputs)
            written = [out for out, given in zip(outputs, [None] * len(outputs), strict=True) if out is not given]
            if not node.op.startswith("Scatter"):
                largest = max([largest, *(_bytes([out]) for out in written)])
        if node.op.startswith("MatMul"):
            first = arguments[0]
            inner = first.shape[0 if node.attributes.get("transpose_x1") else 1]  # type: ignore[union-attr]
            flops += 2 * inner * outputs[0].numel()
    return traffic, flops, largest


def _outputs(node: Node, arguments: Sequence[Tensor | None]) -> Outputs:
    function: Mapping[str, Callable[..., Outputs]] = {**OPERATORS, **RULES}
    if node.op not in function:
        raise KeyError(f"{node.where}: no shape rule")
    try:
        return function[node.op](node, *arguments)
    except (RuntimeError, TypeError, IndexError) as error:
        given = ", ".join("-" if x is None else f"{list(x.shape)} {x.dtype} {x.device.type}" for x in arguments)
        raise RuntimeError(f"{node.where} on ({given}) with {node.attributes}: {error}") from error
