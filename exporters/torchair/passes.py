"""Passes over a traced GE graph: what tracing cannot do by itself. Each changes the GraphDef in place.

Every pass keeps the graph's outputs and in-place writes equal, bit for bit; tests execute the graph before and after.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ...artifacts.ge_ops import Op, count_kinds, live_ops


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


PASSES: dict[str, Callable[[Any], None]] = {
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
