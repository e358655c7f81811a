"""GE operators as ONNX: one function each, and the table of them.

A function is called as f(translation, node), emits ONNX nodes and returns the values of the node's outputs by number;
"" for one that has none. It raises TargetError for attributes and inputs that it does not translate.
"""

from collections.abc import Sequence

from ...artifacts.dtypes import BY_GE
from ...artifacts.ge.binding import ARGUMENT, CONSTANT, PARAMETER
from ...artifacts.ge.graph import Node
from ...artifacts.onnx_ops import MICROSOFT
from .attention import by_row, fused_infer_attention_score, split, split_sizes
from .linear import TABLE_BITS
from .rotary import heads_of, rotated
from .translation import Function, Translation

# FastGelu is x * sigmoid(1.702 x)
_FAST_GELU = 1.702


def mat_mul(t: Translation, node: Node) -> Sequence[str]:
    """MatMul with a weight as stored. How it is quantized:

    not at all where the input was integers: pixels, whose first layer carries the processor's arithmetic
    by channel in a graph without a cache: all tokens at once, bound by arithmetic
    in blocks in a graph over a cache: a step reads each weight for one token, bound by reading; what decides the token,
    a product that is an output of the model, always with 8 bits
    """
    weight, bias, *rest = (*node.inputs[1:], None, None)
    matrix, vector = t.bound_as(weight, PARAMETER), t.bound_as(bias, PARAMETER)
    if (
        matrix is None
        or (vector is None) != (bias is None)
        or any(rest)
        or node.attributes.get("transpose_x1", False)
        or not node.attributes.get("transpose_x2", False)
    ):
        raise t.refused(node, "is expected to multiply by a parameter [outputs, inputs], with a parameter as bias")
    # called as its weight is, whose own name it cannot have
    stem = matrix.name.removesuffix(".weight")
    name = t.name(node, t.writer.fresh(stem if stem != matrix.name else f"{stem}.product"))
    what = (t.value(t.edge(node, 0)), matrix.name, vector.name if vector else None, name)
    linears, bits = t.linears, t.linears.form.bits
    cast = t.behind(node, 0)
    if bits is None or (cast.op == "Cast" and t.is_integer(t.edge(cast, 0))):
        return (linears.floats(*what),)
    if not t.cached:
        return (linears.rows(*what),)
    return (linears.blocks(*what, TABLE_BITS if t.is_output(node) else bits),)


def _norm(t: Translation, op: str, name: str, x: str, node: Node, weights: Sequence[str]) -> str:
    return t.writer.node(op, name, x, *weights, axis=-1, epsilon=_epsilon(node))


def _epsilon(node: Node) -> float:
    """With the default of the operator's definition."""
    epsilon: float = node.attributes.get("epsilon", 1e-6 if node.op in ("RmsNorm", "AddRmsNorm") else 1e-5)
    return epsilon


def rms_norm(t: Translation, node: Node) -> Sequence[str]:
    x, gamma = t.inputs(node)
    return (_norm(t, "RMSNormalization", t.name(node), x, node, [gamma]),)


def layer_norm(t: Translation, node: Node) -> Sequence[str]:
    if len(t.ints(t.edge(node, 1))) != 1 or len(node.inputs) != 4:
        raise t.refused(node, "is expected to be over the last axis, with gamma and beta")
    return (_norm(t, "LayerNormalization", t.name(node), t.inputs(node, 0, 1)[0], node, t.inputs(node, 2)),)


def _add_norm(t: Translation, node: Node, norm: str, fused: str, count: int) -> tuple[str, str]:
    """(normalised sum, sum). One operator, as on the NPU, but for standard ones."""
    if len(node.inputs) != 2 + count:
        raise t.refused(node, f"has {len(node.inputs)} inputs, expected {2 + count}")
    one, other, *weights = t.inputs(node)
    name, total = t.name(node), f"{node.name}.sum"
    if t.standard:
        t.writer.node("Add", total, one, other)
        return _norm(t, norm, name, total, node, weights), total
    inputs, outputs = (one, other, *weights), (name, "", "", total)
    t.writer.nodes(fused, name, *inputs, outputs=outputs, domain=MICROSOFT, epsilon=_epsilon(node))
    return name, total


def add_rms_norm(t: Translation, node: Node) -> Sequence[str]:
    y, total = _add_norm(t, node, "RMSNormalization", "SkipSimplifiedLayerNormalization", 1)
    return y, "", total


def add_layer_norm(t: Translation, node: Node) -> Sequence[str]:
    y, total = _add_norm(t, node, "LayerNormalization", "SkipLayerNormalization", 2)
    return y, "", "", total


def _swish(t: Translation, name: str, x: str, alpha: float = 1.0) -> str:
    """x * sigmoid(alpha x). onnxruntime has a kernel for QuickGelu; the standard Swish it computes in three."""
    if t.standard:
        return t.writer.node("Swish", name, x, alpha=alpha)
    return t.writer.node("QuickGelu", name, x, domain=MICROSOFT, alpha=alpha)


def swish(t: Translation, node: Node) -> Sequence[str]:
    return (_swish(t, t.name(node), t.value(t.edge(node, 0)), node.attributes.get("scale", 1.0)),)


def fast_gelu(t: Translation, node: Node) -> Sequence[str]:
    return (_swish(t, t.name(node), t.value(t.edge(node, 0)), _FAST_GELU),)


def swi_glu(t: Translation, node: Node) -> Sequence[str]:
    if node.attributes.get("dim", -1) != -1:
        raise t.refused(node, "has no translation but for the last axis")
    outputs = (f"{node.name}.gate", f"{node.name}.up")
    gate, up = t.writer.nodes(
        "Split", f"{node.name}.split", t.value(t.edge(node, 0)), outputs=outputs, axis=-1, num_outputs=2
    )
    return (t.writer.node("Mul", t.name(node), _swish(t, f"{node.name}.swish", gate), up),)


def gelu(t: Translation, node: Node) -> Sequence[str]:
    form = (
        {} if node.attributes.get("approximate", "none") == "none" else {"approximate": node.attributes["approximate"]}
    )
    return (t.writer.node("Gelu", t.name(node), t.value(t.edge(node, 0)), **form),)


def _same(op: str) -> Function:
    """An operator that ONNX has, with all of the node's inputs and no attributes."""

    def function(t: Translation, node: Node) -> Sequence[str]:
        return (t.writer.node(op, t.name(node), *t.inputs(node)),)

    return function


def identity(t: Translation, node: Node) -> Sequence[str]:
    return (t.value(t.edge(node, 0)),)


def addcmul(t: Translation, node: Node) -> Sequence[str]:
    if (t.array(t.edge(node, 3)) != 1).any():
        raise t.refused(node, "has no translation but with a value of 1")
    added, one, other = t.inputs(node, 0, 3)
    return (t.writer.node("Add", t.name(node), added, t.writer.node("Mul", f"{node.name}.product", one, other)),)


def cast(t: Translation, node: Node) -> Sequence[str]:
    """To fp32 for every float; between floats nothing."""
    row = BY_GE.get(node.attributes.get("dst_type", -1))
    dtype = row.name if row else None
    x = t.value(t.edge(node, 0))
    if dtype in ("fp32", "fp16", "bf16"):
        return (t.writer.cast(t.name(node), x, "fp32") if t.is_integer(t.edge(node, 0)) else x,)
    if dtype not in ("int32", "int64"):
        raise t.refused(node, f"to {dtype} has no translation")
    return (t.writer.cast(t.name(node), x, dtype),)


def reshape(t: Translation, node: Node) -> Sequence[str]:
    return (t.writer.node("Reshape", t.name(node), t.value(t.edge(node, 0)), t.shape(node)),)


def split_v(t: Translation, node: Node) -> Sequence[str]:
    return split(t, node, t.value(t.edge(node, 0)), split_sizes(t, node))


def rotary(t: Translation, node: Node) -> Sequence[str]:
    """A rotation that no attention reads by row: all tokens are one."""
    heads, dim = heads_of(t, node)
    name, x = t.writer.fresh(node.name), t.value(t.edge(t.behind(node, 0), 0))
    row = t.writer.reshape(f"{name}.row", x, [1, -1, heads * dim])
    return (rotated(t, node, name, row, range(heads), None),)


def concat(t: Translation, node: Node) -> Sequence[str]:
    (axis,) = t.ints(t.edge(node, len(node.inputs) - 1))
    return (t.writer.node("Concat", t.name(node), *t.inputs(node, 0, -1), axis=axis),)


def gather(t: Translation, node: Node) -> Sequence[str]:
    """GatherV2: rows of a parameter or a constant; or of tokens, where a token of each row is asked for."""
    data, index, axis = (t.edge(node, number) for number in range(3))
    name, writer = t.name(node), t.writer
    if t.ints(axis) != [0]:
        raise t.refused(node, f"of axis {t.ints(axis)} has no translation, only of the first")
    argument, rows = t.bound_as(index, ARGUMENT), t.rows()
    if table := t.bound_as(data, PARAMETER):
        if argument is None or len(argument.shape) != 1:
            raise t.refused(node, "is expected to look rows up by an argument [tokens]")
        return (t.linears.embedding(t.value(index), table.name, name),)
    if t.bound_as(data, CONSTANT):
        return (writer.node("Gather", name, t.value(data), t.value(index)),)
    if argument is not None and argument.shape == (1,) and rows is not None:
        picked = writer.node("Gather", f"{node.name}.row", by_row(t, data, rows), t.value(index), axis=1)
        # 0 keeps the rows, and their one token each goes into the width
        return (writer.reshape(name, picked, [0, -1]),)
    return (writer.node("Gather", name, t.value(data), t.value(index), axis=0),)


def scatter_nd_update(t: Translation, node: Node) -> Sequence[str]:
    return (t.writer.node("ScatterND", t.name(node), *t.inputs(node)),)


def reduce_sum(t: Translation, node: Node) -> Sequence[str]:
    if node.attributes.get("keep_dims", False):
        raise t.refused(node, "has no translation that keeps what it sums")
    axes = t.writer.ints(t.ints(t.edge(node, 1)))
    return (t.writer.node("ReduceSum", t.name(node), t.value(t.edge(node, 0)), axes, keepdims=0),)


def arg_max(t: Translation, node: Node) -> Sequence[str]:
    return (
        t.writer.node("ArgMax", t.name(node), t.value(t.edge(node, 0)), axis=t.ints(t.edge(node, 1))[0], keepdims=0),
    )


OPERATORS: dict[str, Function] = {
    "Add": _same("Add"),
    "AddLayerNorm": add_layer_norm,
    "AddRmsNorm": add_rms_norm,
    "Addcmul": addcmul,
    "ArgMaxV2": arg_max,
    "Cast": cast,
    "ConcatV2": concat,
    "FastGelu": fast_gelu,
    "FusedInferAttentionScore": fused_infer_attention_score,
    "GatherV2": gather,
    "GeluV2": gelu,
    "Identity": identity,
    "LayerNormV4": layer_norm,
    "MatMul": mat_mul,
    "Mul": _same("Mul"),
    "RealDiv": _same("Div"),
    "ReduceSum": reduce_sum,
    "Reshape": reshape,
    "RmsNorm": rms_norm,
    "RotaryMul": rotary,
    "RotaryPositionEmbedding": rotary,
    "ScatterNdUpdate": scatter_nd_update,
    "SplitV": split_v,
    "Sub": _same("Sub"),
    "SwiGlu": swi_glu,
    "Swish": swish,
    "TensorMove": identity,
}
