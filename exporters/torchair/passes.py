"""Passes over a traced GE graph: what tracing cannot do by itself. Each changes the GraphDef in place.

Every pass keeps the graph's outputs and in-place writes equal, bit for bit; tests execute the graph before and after.
"""

from collections.abc import Callable, Iterable
from typing import Any

# In-place operators: their effect is a write, so they live even where nothing reads their output.
WRITES = frozenset({"Scatter", "ScatterNdUpdate", "ScatterPaKvCache"})
_INPUTS = ("Data", "RefData")


def _producer(edge: str) -> str:
    return edge.rpartition(":")[0]


def _writes_input(op: Any, by_name: dict[str, Any]) -> bool:
    """Whether an in-place operator writes into an input of the graph, so that the caller sees it."""
    while op is not None and op.type in WRITES:
        op = by_name.get(_producer(op.input[0]))
    return op is not None and op.type in _INPUTS


def _keep(graph: Any, names: Iterable[str]) -> None:
    wanted = set(names)
    ops = [op for op in graph.op if op.name in wanted]
    copies = [type(op).FromString(op.SerializeToString()) for op in ops]
    del graph.op[:]
    graph.op.extend(copies)


def remove_dead_ops(graph: Any) -> None:
    """Drop operators that neither reach NetOutput nor write into an input. Inputs stay: they are the signature."""
    by_name = {op.name: op for op in graph.op}
    live: set[str] = set()
    open_names = [
        op.name
        for op in graph.op
        if op.type in (*_INPUTS, "NetOutput") or (op.type in WRITES and _writes_input(op, by_name))
    ]
    while open_names:
        name = open_names.pop()
        if name in live:
            continue
        live.add(name)
        open_names += [_producer(edge) for edge in by_name[name].input if edge]
    _keep(graph, live)


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
    """Operators by kind: total; device (kernels); shape (arithmetic on shapes); data (inputs, constants, output) and
    layout (Reshape and the like, which move no bytes)."""
    kinds = {kind: name for name, group in _KINDS.items() for kind in group}
    counts = dict.fromkeys(("total", "device", "shape", "layout", "data"), 0)
    for op in graph.op:
        counts["total"] += 1
        counts[kinds.get(op.type, "device")] += 1
    return counts


_KINDS = {
    "data": ("Data", "RefData", "Const", "NetOutput"),
    "shape": ("Shape", "Gather", "Pack"),
    "layout": ("Reshape", "Unsqueeze", "Squeeze", "Identity"),
}
