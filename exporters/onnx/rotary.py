"""RotaryMul with tables that the graph looks up as RotaryEmbedding with half the columns of cos and sin.

The graph's tables hold cos and sin of a position side by side, every angle twice, and, where one rotation takes q, k
and v together, once for each head. RotaryEmbedding takes every angle once, for all heads. So a table is followed back
to the constants that it is computed of, a range of columns and a head at a time: what is the same there is the same.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.ge.binding import CONSTANT
from ...artifacts.ge.graph import Node
from .translation import Edge, Translation

ROTATIONS = ("RotaryMul", "RotaryPositionEmbedding")
# operator, then operands: ("constant", name, head, begin, count), ("rows", constant, edge), ("Mul" or "Add", a, b),
# ("ReduceSum", x, axis)
Table = tuple[Any, ...]


def rotated(t: Translation, rotation: Node, name: str, x: str, heads: range, shape: str | None) -> str:
    """x [rows, tokens, heads x D], the heads with these numbers, turned as `rotation` turns them; shape is [rows,
    tokens, -1], None for one row. Heads with cos 1 and sin 0 are x itself.

    Raises TargetError for tables that have another cos or sin for each head, or for each half of a head.
    """
    mode = rotation.attributes.get("rotary_mode", rotation.attributes.get("mode", "half"))
    if mode not in ("half", 0) or any(rotation.inputs[3:]):
        raise t.refused(rotation, f"mode {mode} has no translation, only the rotation of halves")
    _, dim = heads_of(t, rotation)
    half = dim // 2
    tables = [
        [_resolved(t, rotation, edge, begin, half, head) for head in heads for begin in (0, half)]
        for edge in rotation.inputs[1:3]
        if edge
    ]
    if any(not _same(t, table, other) for table, *others in tables for other in others):
        raise t.refused(rotation, "turns each head, or each half of a head, in its own way")
    cos, sin = (table for table, *_ in tables)
    if cos[0] == sin[0] == "constant" and (_array(t, cos) == 1).all() and (_array(t, sin) == 0).all():
        return x
    shape = shape or t.writer.ints([1, -1, half])
    values = (_emitted(t, f"rope.{what}", table, shape) for what, table in (("cos", cos), ("sin", sin)))
    return t.writer.node("RotaryEmbedding", name, x, *values, num_heads=len(heads))


def heads_of(t: Translation, rotation: Node) -> tuple[int, int]:
    """How many heads a rotation turns, and their width: what the Reshape before it gives."""
    view = t.behind(rotation, 0)
    target = t.target(view) if view.op == "Reshape" else ()
    if len(target) != 4 or not target[2] or not target[3] or target[2] < 0 or target[3] < 0:
        raise t.refused(rotation, "is expected to turn a view [1, tokens, heads, width]")
    return target[2], target[3]


def _resolved(t: Translation, rotation: Node, edge: Edge, begin: int, count: int, head: int) -> Table:
    """Columns of a table, for one head, as an expression of constants: once, however many ways lead to it."""
    key = (edge, begin, count, head)
    if key not in t.resolved:
        t.resolved[key] = _resolve(t, rotation, edge, begin, count, head)
    return t.resolved[key]


def _resolve(t: Translation, rotation: Node, edge: Edge, begin: int, count: int, head: int) -> Table:
    node = t.nodes[edge[0]]
    if bound := t.bound_as(edge, CONSTANT):
        sizes = t.constants[bound.name].shape
        # what is one for all heads, or for all columns, is the same expression for each
        head = head if len(sizes) == 4 and sizes[2] > 1 else 0
        return ("constant", bound.name, head, *((begin, count) if sizes[-1] > 1 else (0, 1)))

    def of(number: int) -> Table:
        return _resolved(t, rotation, t.edge(node, number), begin, count, head)

    if node.op == "SplitV" and t.ints(t.edge(node, 2)) == [-1]:
        before = sum(t.ints(t.edge(node, 1))[: edge[1]])
        return _resolved(t, rotation, t.edge(node, 0), before + begin, count, head)
    if node.op == "Reshape":
        return of(0)
    if node.op in ("Mul", "Add"):
        return (node.op, of(0), of(1))
    if node.op == "ReduceSum" and t.ints(t.edge(node, 1)) == [0] and not node.attributes.get("keep_dims", False):
        return ("ReduceSum", of(0), 0)
    if node.op in ("GatherV2", "Gather") and t.ints(t.edge(node, 2)) == [0] and t.bound_as(t.edge(node, 0), CONSTANT):
        return ("rows", of(0), t.edge(node, 1))
    if node.op == "Addcmul" and (t.array(t.edge(node, 3)) == 1).all() and t.bound_as(t.edge(node, 2), CONSTANT):
        # added + x * factor, where the factor turns x on or off for a head
        factor, added = _array(t, of(2)), of(0)
        if (factor == 0).all():
            return added
        if (factor == 1).all() and added[0] == "constant" and (_array(t, added) == 0).all():
            return of(1)
        return ("Add", added, ("Mul", of(1), of(2)))
    raise t.refused(rotation, f"its angles come from {node.where}, which has no translation there")


def _array(t: Translation, table: Table) -> NDArray[Any]:
    """The columns of a constant [..., heads or 1, columns or 1], for one head."""
    _, name, head, begin, count = table
    columns = t.constants[name][..., begin : begin + count]
    return columns[..., head, :] if columns.ndim == 4 else columns


def _same(t: Translation, one: Any, other: Any) -> bool:
    """Whether two expressions are of the same operators and numbers."""
    if one == other:
        return True
    if isinstance(one, tuple) and one[0] == "constant":
        return isinstance(other, tuple) and one[:2] == other[:2] and np.array_equal(_array(t, one), _array(t, other))
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other):
        return all(_same(t, a, b) for a, b in zip(one, other, strict=True))
    return False


def _emitted(t: Translation, name: str, table: Table, shape: str) -> str:
    """The table as [rows, tokens, columns]: once, whoever asks, and computed once for every shape."""
    if (table, "") not in t.tables:
        t.tables[table, ""] = _flat(t, name, table)
    if (table, shape) not in t.tables:
        t.tables[table, shape] = t.writer.node("Reshape", t.writer.fresh(name), t.tables[table, ""], shape)
    return t.tables[table, shape]


def _flat(t: Translation, name: str, table: Table) -> str:
    kind, *operands = table
    writer = t.writer
    if kind == "constant":
        return writer.constant(f"constants.{'.'.join(map(str, operands))}", _array(t, table), None)
    if kind == "rows":
        return writer.node("Gather", writer.fresh(f"{name}.rows"), _flat(t, name, operands[0]), t.value(operands[1]))
    if kind == "ReduceSum":
        added = _flat(t, name, operands[0])
        return writer.node("ReduceSum", writer.fresh(f"{name}.sum"), added, writer.ints([operands[1]]), keepdims=0)
    both = [_flat(t, name, each) for each in operands]
    return writer.node(kind, writer.fresh(f"{name}.{kind}"), *both)
