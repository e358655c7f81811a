"""FusedInferAttentionScore in BSH, and what leads to it: q, k and v as [rows, tokens, width].

Between a product and its attention stand views, a split and a rotation, each over all tokens at once. They are read
through, down to the product, and emitted again in the form that ONNX's attentions take: one Reshape of the product by
rows, one Split, and a RotaryEmbedding of each part that turns. One kernel each, and no tables by head.
"""

import math
from typing import Any

import numpy as np

from ...artifacts.ge.binding import ARGUMENT, CACHE, CONSTANT, LENGTHS
from ...artifacts.ge.graph import Node
from ...artifacts.onnx_ops import MICROSOFT
from .rotary import ROTATIONS, heads_of, rotated
from .translation import Edge, Translation

_CAUSAL = 3


def by_row(t: Translation, edge: Edge, shape: str, width: int | None = None) -> str:
    """A value as [rows, tokens, width], where shape is the ONNX value [rows, tokens, -1].

    width: what the reader takes; a view on the way that has another is refused.
    """
    if (edge, shape) not in t.by_row:
        node = t.nodes[edge[0]]
        if node.op == "Reshape":
            found = math.prod(size for size in t.target(node)[1:] if size and size > 0)
            if width not in (None, found):
                raise t.refused(node, f"has {found} columns a token where its reader takes {width}")
            t.by_row[edge, shape] = by_row(t, t.edge(node, 0), shape, found)
        elif node.op == "SplitV":
            for number, part in enumerate(_parts(t, node, shape)):
                t.by_row[(node.name, number), shape] = part
        elif node.op in ROTATIONS:
            heads, dim = heads_of(t, node)
            x = by_row(t, t.edge(node, 0), shape, heads * dim)
            t.by_row[edge, shape] = rotated(t, node, t.writer.fresh(node.name), x, range(heads), shape)
        elif node.op == "FusedInferAttentionScore" and t.cached:
            t.by_row[edge, shape] = t.value(edge)
        else:
            t.by_row[edge, shape] = t.writer.node("Reshape", f"{t.value(edge)}.by_row", t.value(edge), shape)
    return t.by_row[edge, shape]


def split_sizes(t: Translation, node: Node) -> list[int]:
    """The widths of a SplitV's outputs. Raises TargetError for another axis than the last."""
    if t.ints(t.edge(node, 2)) != [-1]:
        raise t.refused(node, f"a split of axis {t.ints(t.edge(node, 2))} has no translation, only of the last")
    return t.ints(t.edge(node, 1))


def split(t: Translation, node: Node, x: str, sizes: list[int]) -> tuple[str, ...]:
    """x split on its last axis."""
    name = t.writer.fresh(node.name)
    outputs = tuple(f"{name}.{i}" for i in range(len(sizes)))
    if len(set(sizes)) == 1:
        return t.writer.nodes("Split", name, x, outputs=outputs, axis=-1, num_outputs=len(sizes))
    return t.writer.nodes("Split", name, x, t.writer.ints(sizes), outputs=outputs, axis=-1)


def _parts(t: Translation, node: Node, shape: str) -> tuple[str, ...]:
    """A split by row. What one rotation turned before it is split first: RotaryEmbedding turns all heads alike, so q
    and k are turned each by itself, and v, which the tables leave as it is, not at all."""
    sizes, source = split_sizes(t, node), t.edge(node, 0)
    origin = t.behind(node, 0)
    rotation = t.behind(origin, 0) if origin.op == "Reshape" else origin
    if rotation.op not in ROTATIONS:
        return split(t, node, by_row(t, source, shape, sum(sizes)), sizes)
    _, dim = heads_of(t, rotation)
    x, turned, first = by_row(t, t.edge(rotation, 0), shape, sum(sizes)), [], 0
    for part, size in zip(split(t, node, x, sizes), sizes, strict=True):
        if size % dim:
            raise t.refused(node, f"splits heads of {dim} columns into {sizes}")
        heads = range(first, first := first + size // dim)
        turned.append(rotated(t, rotation, f"{part}.rotated", part, heads, shape))
    return tuple(turned)


def fused_infer_attention_score(t: Translation, node: Node) -> tuple[str, ...]:
    """Over the cache it writes, causal; or of segments, each of which sees itself alone."""
    q, k, v = (t.edge(node, number) for number in range(3))
    shift, mask, lengths, lengths_kv = (*node.inputs[3:], None, None, None, None)[:4]
    attributes = node.attributes
    if attributes.get("input_layout") != "BSH" or shift or any(node.inputs[7:]):
        raise t.refused(node, f"layout {attributes.get('input_layout')} with {len(node.inputs)} inputs; only BSH")
    heads = attributes["num_heads"]
    kv_heads = attributes.get("num_key_value_heads", 0) or heads
    scale, causal = float(attributes["scale"]), attributes.get("sparse_mode", 0) == _CAUSAL
    if causal != t.cached or (mask is not None) != causal or (causal and not _is_causal(t, mask)):
        raise t.refused(node, "is expected to be causal over a cache, or to see everything without one")
    if any(each and not t.bound_as(each, LENGTHS) for each in (lengths, lengths_kv)) or (causal and lengths):
        raise t.refused(node, "its lengths are expected to be those that the caller gives")
    if causal:
        return _over_the_cache(t, node, q, (k, v), heads, kv_heads, scale)
    operands = []
    for each in (q, k, v):
        shape = t.rows_of(t.nodes[each[0]])
        operands.append(by_row(t, each, shape) if shape else t.value(each))
    # Of the keys: what is behind a query's length is read by nobody. Lengths that the model does not take say nothing:
    # its rows are of one.
    valid, name = t.given(lengths_kv, LENGTHS), t.name(node)
    if t.standard or heads != kv_heads:
        operands += ["", "", "", valid] if valid else []
        count = {"q_num_heads": heads, "kv_num_heads": kv_heads}
        return (t.writer.node("Attention", name, *operands, scale=scale, **count),)
    # the standard operator's kernel holds all scores, heads x tokens x tokens, at once; and so does this with lengths
    operands += ["", _int32(t, valid)] if valid else []
    return (t.writer.node("MultiHeadAttention", name, *operands, domain=MICROSOFT, num_heads=heads, scale=scale),)


def _int32(t: Translation, lengths: str) -> str:
    name = f"{lengths}.int32"
    return name if t.writer.has(name) else t.writer.cast(name, lengths, "int32")


def _is_causal(t: Translation, mask: Edge | None) -> bool:
    """Whether the mask hides what lies ahead: the operator takes the triangle that it is given."""
    bound = t.bound_as(mask, CONSTANT)
    if bound is None:
        return False
    array = t.constants[bound.name]
    return array.dtype == np.bool_ and array.ndim == 2 and np.array_equal(array, np.triu(np.ones_like(array), 1))


def _over_the_cache(
    t: Translation, node: Node, q: Edge, written: tuple[Edge, Edge], heads: int, kv_heads: int, scale: float
) -> tuple[str, ...]:
    """One kernel that writes the new tokens into the cache, in place, and reads it up to what is there; with standard
    operators only one that writes each side, and one that reads its whole length."""
    shape, operands, caches, width = t.rows(), [], [], 0
    if shape is None:
        raise t.refused(node, "no argument of its graph has rows")
    for side, edge in zip(("key", "value"), written, strict=True):
        scatter = t.nodes[edge[0]]
        cache = t.bound_as(t.edge(scatter, 0), CACHE) if scatter.op == "Scatter" else None
        if (
            cache is None
            or scatter.attributes.get("axis") != 1
            or scatter.attributes.get("reduce", "update") != "update"
            or not t.bound_as(t.edge(scatter, 1), ARGUMENT)
        ):
            raise t.refused(node, f"its {side} is expected to be a cache that one Scatter wrote new tokens into")
        width = cache.shape[2]
        operands.append(by_row(t, t.edge(scatter, 2), shape, width))
        caches.append(f"{side}.{cache.index}")
    query = by_row(t, q, shape, width // kv_heads * heads)
    present = [f"present_{cache}" for cache in caches]
    name = t.name(node)
    count: dict[str, Any] = {"kv_num_heads": kv_heads, "scale": scale}
    if t.standard:
        for new, before, out in zip(operands, caches, present, strict=True):
            t.writer.node("TensorScatter", out, before, new, _write_at(t), axis=1)
        inputs = (query, *present, "", "", "", "kv_lengths")
        return (t.writer.node("Attention", name, *inputs, is_causal=1, q_num_heads=heads, **count),)
    inputs = (query, *operands, *caches, *_lengths(t))
    outputs = (name, *present)
    t.writer.nodes("GroupQueryAttention", name, *inputs, outputs=outputs, domain=MICROSOFT, num_heads=heads, **count)
    return (name,)


def _write_at(t: Translation) -> str:
    """The first position that each row's new tokens take."""
    if not t.writer.has("write_at"):
        tokens = t.writer.node("Shape", "tokens", "token_ids", start=1, end=2)
        t.writer.node("Sub", "write_at", "kv_lengths", tokens)
    return "write_at"


def _lengths(t: Translation) -> tuple[str, str]:
    """Each row's last position, and the length of the longest, as GroupQueryAttention takes them."""
    if not t.writer.has("longest"):
        t.writer.node("Sub", "last_position", "kv_lengths", t.writer.constant("one_int", 1, np.int64))
        t.writer.node("ReduceMax", "longest", "kv_lengths", keepdims=0)
    return _int32(t, "last_position"), _int32(t, "longest")
