"""Passes over a traced GE graph: what tracing cannot do by itself. Each changes the GraphDef in place.

Every pass keeps the graph's outputs and in-place writes equal, bit for bit; tests execute the graph before and after.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ...artifacts.ge_ops import CONSTANT, INPUTS, Op, count_kinds, live_ops


def _producer(edge: str) -> str:
    return edge.rpartition(":")[0]


def _keep(graph: Any, names: Iterable[str]) -> None:
    wanted = set(names)
    ops = [op for op in graph.op if op.name in wanted]
    copies = [type(op).FromString(op.SerializeToString()) for op in ops]
    del graph.op[:]
    graph.op.extend(copies)


def remove_dead_ops(graph: Any) -> None:
    """Drop operators that neither reach NetOutput nor write into an input. Inputs stay: they are the signature."""
    ops = (Op(op.name, op.type, tuple(_producer(edge) or None for edge in op.input)) for op in graph.op)
    _keep(graph, live_ops(ops))


def merge_equal_constants(graph: Any) -> None:
    """Keep one of each set of Consts with the same bytes, dtype and shape."""
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    for op in graph.op:
        if op.type == "Const":
            value = op.attr["value"].t
            key = value.desc.SerializeToString(deterministic=True) + b"\0" + value.data
            renamed[op.name] = first.setdefault(key, op.name)
    for op in graph.op:
        for i, edge in enumerate(op.input):
            if edge and renamed.get(_producer(edge), _producer(edge)) != _producer(edge):
                op.input[i] = f"{renamed[_producer(edge)]}:{edge.rpartition(':')[2]}"
    _keep(graph, [op.name for op in graph.op if renamed.get(op.name, op.name) == op.name])


def drop_same_dtype_casts(graph: Any) -> None:
    """Drop Casts to the dtype that the value already has: torchair puts one behind every half-precision product."""
    dtypes = _dtypes(graph)
    source: dict[str, str] = {}
    for op in graph.op:
        if op.type == "Cast":
            wanted = _FROM_ATTRIBUTE.get(op.attr["dst_type"].i)
            if wanted is not None and dtypes.get(_producer(op.input[0])) == wanted:
                source[op.name] = source.get(_producer(op.input[0]), op.input[0])
    for op in graph.op:
        for i, edge in enumerate(op.input):
            if edge and _producer(edge) in source:
                value = source[_producer(edge)]
                # an edge to output -1 orders operators and carries no value
                op.input[i] = f"{_producer(value)}:-1" if edge.endswith(":-1") else value
    _keep(graph, [op.name for op in graph.op if op.name not in source])


# Operators whose only output, or whose every output that is read, has the dtype of their first input.
_LIKE_FIRST_INPUT = frozenset({"GatherV2", "Mul", "Add", "Reshape", "ReduceSum", "SplitV", "TensorMove"})
# ge::DataType, in attributes, to ge.proto.DataType, in descriptors
_FROM_ATTRIBUTE = {0: 1, 1: 2, 27: 27}


def _dtypes(graph: Any) -> dict[str, int]:
    """ge.proto.DataType of the operators whose dtype follows from the graph; descriptors inside it say nothing."""
    found: dict[str, int] = {}
    for op in graph.op:
        if op.type in (*INPUTS, CONSTANT):
            found[op.name] = op.output_desc[0].dtype
        elif op.type in ("Cast", "FileConstant"):
            number = op.attr["dst_type"].i if op.type == "Cast" else op.attr["dtype"].dt
            if (dtype := _FROM_ATTRIBUTE.get(number)) is not None:
                found[op.name] = dtype
        elif op.type in _LIKE_FIRST_INPUT and (dtype := found.get(_producer(op.input[0]))) is not None:
            found[op.name] = dtype
    return found


PASSES: dict[str, Callable[[Any], None]] = {
    "drop_same_dtype_casts": drop_same_dtype_casts,
    "remove_dead_ops": remove_dead_ops,
    "merge_equal_constants": merge_equal_constants,
}


def run_passes(graph: Any, names: Iterable[str]) -> None:
    """Apply the named passes in the order of PASSES."""
    wanted = set(names)
    for name, function in PASSES.items():
        if name in wanted:
            function(graph)


def count_ops(graph: Any) -> dict[str, int]:
    """Operators by kind, as `artifacts.ge_ops` tells them apart."""
    return count_kinds(op.type for op in graph.op)
