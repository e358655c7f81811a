"""Shapes and dtypes of everything in a GE graph, for given shapes of its inputs: one rule per operator type.

Plain Python, so that looking into an artifact imports no engine. The rules state what `runtime.backends.ge.operators`
computes; a test holds the two together, operator by operator.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

from ...artifacts.errors import ArtifactError
from ...artifacts.ge.graph import ATTRIBUTE_DTYPES, ITEM_BYTES, Constant, GeGraph, Node
from ...artifacts.ge.ops import OUTPUT, Op, live_ops

# Shapes, axes and sizes are constants of a few integers; larger ones are data.
_MOST_VALUES = 64
_INTEGERS = {"int32": "i", "int64": "q"}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its data; `values` are those of a small integer constant, which decide other shapes."""

    dtype: str
    shape: tuple[int, ...]
    values: tuple[int, ...] | None = None

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Specs = tuple[TensorSpec, ...]
Rule = Callable[..., Specs]


class _Misfit(Exception):
    """Inputs that the operator cannot take; `propagate` adds which operator and which inputs."""


def graph_ops(graph: GeGraph) -> list[Op]:
    """The graph's operators, in order, as `artifacts.ge_ops` counts them."""
    return [
        Op(node.name, node.op, tuple(edge[0] if edge else None for edge in node.inputs), node.after)
        for node in graph.nodes
    ]


def live_nodes(graph: GeGraph) -> tuple[Node, ...]:
    """The nodes that reach NetOutput or write into an input, in execution order; NetOutput itself left out."""
    live = live_ops(graph_ops(graph))
    return tuple(node for node in graph.nodes if node.name in live and node.op != OUTPUT)


def node_inputs(node: Node, specs: Mapping[str, Specs]) -> list[TensorSpec | None]:
    """What a node reads, None where an optional input is not fed."""
    return [specs[edge[0]][edge[1]] if edge else None for edge in node.inputs]


def propagate(graph: GeGraph, inputs: Iterable[TensorSpec], where: str) -> dict[str, Specs]:
    """Outputs of every live node by its name, for `inputs` in the order of the graph's Data nodes.

    Raises ArtifactError naming the operator: one that has no rule, or one that its inputs do not fit.
    """
    specs: dict[str, Specs] = {node.name: (spec,) for node, spec in zip(graph.inputs, inputs, strict=True)}
    for node in live_nodes(graph):
        if node.name in specs:
            continue
        if node.constant is not None:
            specs[node.name] = (_constant(node.constant),)
            continue
        rule = RULES.get(node.op)
        if rule is None:
            raise ArtifactError(
                f"{where}: {node.where} has no shape rule; there are rules for {', '.join(sorted(RULES))}"
            )
        given = node_inputs(node, specs)
        try:
            specs[node.name] = rule(node, *given)
        except (_Misfit, ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            shown = ", ".join("-" if spec is None else str(spec) for spec in given)
            raise ArtifactError(f"{where}: {node.where} does not take ({shown}): {error}") from error
    return specs


def _constant(constant: Constant) -> TensorSpec:
    code = _INTEGERS.get(constant.dtype)
    count = prod(constant.shape)
    values = struct.unpack(f"<{count}{code}", constant.data) if code and count <= _MOST_VALUES else None
    return TensorSpec(constant.dtype, constant.shape, values)


def _fits(condition: bool, problem: str) -> None:
    if not condition:
        raise _Misfit(problem)


def _values(spec: TensorSpec) -> tuple[int, ...]:
    if spec.values is None:
        raise _Misfit(f"{spec} must be a constant of at most {_MOST_VALUES} integers")
    return spec.values


def _broadcast(a: TensorSpec, b: TensorSpec) -> tuple[int, ...]:
    """Numpy's rule: align at the right; equal sizes, or one of them is 1."""
    rank = max(len(a.shape), len(b.shape))
    pairs = list(zip(*((1,) * (rank - len(s.shape)) + s.shape for s in (a, b)), strict=True))
    _fits(all(m == n or 1 in (m, n) for m, n in pairs), "the shapes do not broadcast")
    return tuple(n if m == 1 else m for m, n in pairs)


def _elementwise(node: Node, x1: TensorSpec, x2: TensorSpec) -> Specs:
    _fits(x1.dtype == x2.dtype, "the dtypes differ")
    return (TensorSpec(x1.dtype, _broadcast(x1, x2)),)


def _same(node: Node, x: TensorSpec) -> Specs:
    return (TensorSpec(x.dtype, x.shape),)


def _in_place(node: Node, var: TensorSpec, indices: TensorSpec, updates: TensorSpec) -> Specs:
    """The output is the first input's memory."""
    _fits(var.dtype == updates.dtype and len(var.shape) == len(updates.shape), "updates do not fit the variable")
    return (TensorSpec(var.dtype, var.shape),)


def _mat_mul(
    node: Node, x1: TensorSpec, x2: TensorSpec, bias: TensorSpec | None = None, *unfed: TensorSpec | None
) -> Specs:
    m, k = reversed(x1.shape) if node.attributes.get("transpose_x1") else x1.shape
    rows, n = reversed(x2.shape) if node.attributes.get("transpose_x2") else x2.shape
    _fits(k == rows, f"inner sizes {k} and {rows} differ")
    _fits(bias is None or bias.shape == (n,), f"the bias must have {n} values")
    return (TensorSpec(x1.dtype, (m, n)),)


def _rms_norm(node: Node, x: TensorSpec, gamma: TensorSpec) -> Specs:
    """y, and rstd [.., 1] in fp32."""
    _fits(gamma.shape == x.shape[-1:], "gamma must have the size of the last axis")
    return TensorSpec(x.dtype, x.shape), TensorSpec("fp32", (*x.shape[:-1], 1))


def _add_rms_norm(node: Node, x1: TensorSpec, x2: TensorSpec, gamma: TensorSpec) -> Specs:
    """y, rstd, x1 + x2."""
    _fits(x1 == x2, "the addends differ")
    return (*_rms_norm(node, x1, gamma), TensorSpec(x1.dtype, x1.shape))


def _normalized(x: TensorSpec, axes: tuple[int, ...]) -> Specs:
    """y, mean and rstd; the last two in fp32, with 1 for the normalised axes."""
    _fits(x.shape[len(x.shape) - len(axes) :] == axes, f"the trailing axes are not {list(axes)}")
    moment = TensorSpec("fp32", x.shape[: len(x.shape) - len(axes)] + (1,) * len(axes))
    return TensorSpec(x.dtype, x.shape), moment, moment


def _layer_norm(node: Node, x: TensorSpec, axes: TensorSpec, gamma: TensorSpec, beta: TensorSpec) -> Specs:
    return _normalized(x, _values(axes))


def _add_layer_norm(
    node: Node, x1: TensorSpec, x2: TensorSpec, gamma: TensorSpec, beta: TensorSpec, bias: TensorSpec | None = None
) -> Specs:
    """y, mean, rstd, x1 + x2 (+ bias)."""
    _fits(x1 == x2, "the addends differ")
    return (*_normalized(x1, gamma.shape), TensorSpec(x1.dtype, x1.shape))


def _rotary_mul(node: Node, x: TensorSpec, r1: TensorSpec, r2: TensorSpec) -> Specs:
    _fits(r1.shape == r2.shape and _broadcast(x, r1) == x.shape, "cos and sin do not fit x")
    return _same(node, x)


def _swi_glu(node: Node, x: TensorSpec) -> Specs:
    axis = node.attributes.get("dim", -1) % len(x.shape)
    _fits(x.shape[axis] % 2 == 0, f"axis {axis} is odd")
    return (TensorSpec(x.dtype, (*x.shape[:axis], x.shape[axis] // 2, *x.shape[axis + 1 :])),)


def _split_v(node: Node, x: TensorSpec, size_splits: TensorSpec, split_dim: TensorSpec) -> Specs:
    sizes, axis = _values(size_splits), _values(split_dim)[0] % len(x.shape)
    _fits(sum(sizes) == x.shape[axis], f"the parts {list(sizes)} do not add up to axis {axis}")
    return tuple(TensorSpec(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in sizes)


def _reshape(node: Node, x: TensorSpec, shape: TensorSpec) -> Specs:
    """0 keeps a size, -1 is inferred."""
    wanted = _values(shape)
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    known, count = prod(size for size in sizes if size != -1), prod(x.shape)
    if -1 in sizes:
        _fits(sizes.count(-1) == 1 and known > 0 and count % known == 0, f"no shape {list(wanted)} of {count} values")
        sizes[sizes.index(-1)] = count // known
    _fits(prod(sizes) == count, f"no shape {list(wanted)} of {count} values")
    return (TensorSpec(x.dtype, tuple(sizes)),)


def _gather(node: Node, x: TensorSpec, indices: TensorSpec, axis: TensorSpec) -> Specs:
    (dimension,) = _values(axis)
    dimension %= len(x.shape)
    return (TensorSpec(x.dtype, x.shape[:dimension] + indices.shape + x.shape[dimension + 1 :]),)


def _reduced(x: TensorSpec, axes: Iterable[int], keep: bool) -> tuple[int, ...]:
    gone = {axis % len(x.shape) for axis in axes}
    return tuple(1 if i in gone else size for i, size in enumerate(x.shape) if keep or i not in gone)


def _reduce_sum(node: Node, x: TensorSpec, axes: TensorSpec) -> Specs:
    return (TensorSpec(x.dtype, _reduced(x, _values(axes), node.attributes.get("keep_dims", False))),)


def _shape(node: Node, x: TensorSpec) -> Specs:
    return (TensorSpec(ATTRIBUTE_DTYPES[node.attributes.get("dtype", 3)], (len(x.shape),), x.shape),)


def _gather_sizes(node: Node, x: TensorSpec, indices: TensorSpec) -> Specs:
    """Gather: elements of a vector, as arithmetic on shapes uses it."""
    _fits(len(x.shape) == 1, "only vectors are gathered from")
    return (TensorSpec(x.dtype, indices.shape, tuple(_values(x)[i] for i in _values(indices))),)


def _pack_sizes(node: Node, *values: TensorSpec) -> Specs:
    """Pack: numbers to a vector."""
    _fits(all(value.shape == () for value in values), "only single numbers are packed")
    return (TensorSpec(values[0].dtype, (len(values),), tuple(_values(value)[0] for value in values)),)


def _is_finite(node: Node, x: TensorSpec) -> Specs:
    return (TensorSpec("bool", x.shape),)


def _select(node: Node, condition: TensorSpec, x1: TensorSpec, x2: TensorSpec) -> Specs:
    _fits(condition.dtype == "bool" and x1.dtype == x2.dtype, "the dtypes differ")
    chosen = TensorSpec(x1.dtype, _broadcast(x1, x2))
    return (TensorSpec(x1.dtype, _broadcast(condition, chosen)),)


def _add_product(node: Node, x: TensorSpec, x1: TensorSpec, x2: TensorSpec, value: TensorSpec) -> Specs:
    """Addcmul: x + value * x1 * x2."""
    _fits(x.dtype == x1.dtype == x2.dtype == value.dtype, "the dtypes differ")
    return (TensorSpec(x.dtype, _broadcast(x, TensorSpec(x.dtype, _broadcast(x1, x2)))),)


def _arg_max(node: Node, x: TensorSpec, dimension: TensorSpec) -> Specs:
    return (TensorSpec(ATTRIBUTE_DTYPES[node.attributes["dtype"]], _reduced(x, _values(dimension)[:1], False)),)


def _cast(node: Node, x: TensorSpec) -> Specs:
    return (TensorSpec(ATTRIBUTE_DTYPES[node.attributes["dst_type"]], x.shape),)


def _attention(node: Node, q: TensorSpec, k: TensorSpec, v: TensorSpec, *rest: TensorSpec | None) -> Specs:
    """BSH: q [batch, tokens, heads * dim], k and v [batch, length, kv_heads * dim]. TND: [tokens, heads, dim]."""
    _fits(k.shape == v.shape and len(q.shape) == len(k.shape) == 3, "query, key and value do not fit")
    heads = node.attributes["num_heads"]
    kv_heads = node.attributes["num_key_value_heads"] or heads
    if node.attributes["input_layout"] == "BSH":
        _fits(q.shape[2] * kv_heads == k.shape[2] * heads and q.shape[0] == k.shape[0], "query and key do not fit")
    else:
        _fits(node.attributes["input_layout"] == "TND", f"the layout is {node.attributes['input_layout']}")
        _fits(q.shape[1:] == (heads, k.shape[2]) and k.shape[1] == kv_heads, "query and key do not fit")
    return (TensorSpec(q.dtype, q.shape),)


def _fused_attention(node: Node, q: TensorSpec, k: TensorSpec, v: TensorSpec, *rest: TensorSpec | None) -> Specs:
    """attention_out; softmax_lse is a placeholder of one fp32 value, as with softmax_lse_flag false on the device."""
    return (*_attention(node, q, k, v, *rest), TensorSpec("fp32", (1,)))


RULES: dict[str, Rule] = {
    "Add": _elementwise,
    "AddLayerNorm": _add_layer_norm,
    "AddRmsNorm": _add_rms_norm,
    "Addcmul": _add_product,
    "ArgMaxV2": _arg_max,
    "Cast": _cast,
    "FastGelu": _same,
    "FusedInferAttentionScore": _fused_attention,
    "Gather": _gather_sizes,
    "GatherV2": _gather,
    "GeluV2": _same,
    "Identity": _same,
    "IncreFlashAttention": _attention,
    "IsFinite": _is_finite,
    "LayerNormV4": _layer_norm,
    "MatMul": _mat_mul,
    "Mul": _elementwise,
    "Pack": _pack_sizes,
    "PromptFlashAttention": _attention,
    "ReduceAll": _reduce_sum,
    "ReduceSum": _reduce_sum,
    "Reshape": _reshape,
    "RmsNorm": _rms_norm,
    "RotaryMul": _rotary_mul,
    "RotaryPositionEmbedding": _rotary_mul,
    "Scatter": _in_place,
    "ScatterNdUpdate": _in_place,
    "SelectV2": _select,
    "Shape": _shape,
    "SplitV": _split_v,
    "SwiGlu": _swi_glu,
    "TensorMove": _same,
}
