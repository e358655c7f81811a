"""Passes over a traced GE graph: what tracing cannot do by itself. Each changes the GraphDef in place.

Every pass keeps the graph's outputs and in-place writes equal, bit for bit; tests execute the graph before and after.
"""

from collections.abc import Callable, Iterable
from typing import Any

from ...artifacts.ge.ops import CONSTANT
from ...runtime.ops import known
from ...runtime.ops.base import SHAPE
from ...runtime.ops.graphs import count_kinds, live_ops, op_of
from .device_passes import (
    describe_dtypes,
    drop_what_is_not_asked,
    normalise_over_int32,
    rotate_any_width,
    write_fresh_tensors,
)
from .dtypes import data_inputs, input_dtypes, tensor_dtypes


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
    _keep(graph, live_ops(op_of(op.name, op.type, op.input) for op in graph.op))


def merge_equal_constants(graph: Any) -> None:
    """Keep one of each set of Consts with the same bytes, dtype and shape."""
    first: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    for op in graph.op:
        if op.type == CONSTANT:
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
    dtypes = tensor_dtypes(graph)
    source: dict[str, str] = {}
    for op in graph.op:
        if op.type == "Cast" and dtypes[op.name] == input_dtypes(op, dtypes)[:1]:
            edge = op.input[data_inputs(op)[0]]
            source[op.name] = source.get(_producer(edge), edge)
    for op in graph.op:
        for i, edge in enumerate(op.input):
            if edge and _producer(edge) in source:
                value = source[_producer(edge)]
                # an edge to output -1 orders operators and carries no value
                op.input[i] = f"{_producer(value)}:-1" if edge.endswith(":-1") else value
    _keep(graph, [op.name for op in graph.op if op.name not in source])


def merge_equal_shapes(graph: Any) -> None:
    """Keep one of each set of operators that compute the same shape: torchair packs one for every view.

    Arithmetic on shapes is pure, so two that read the same give the same.
    """
    first: dict[tuple[Any, ...], str] = {}
    renamed: dict[str, str] = {}
    for op in graph.op:
        for i, edge in enumerate(op.input):
            if edge and (name := renamed.get(_producer(edge))):
                op.input[i] = f"{name}:{edge.rpartition(':')[2]}"
        if known(op.type).kind == SHAPE:
            attributes = tuple(
                sorted((k, v.SerializeToString(deterministic=True)) for k, v in op.attr.items() if k[0] != "_")
            )
            name = first.setdefault((op.type, tuple(op.input), attributes), op.name)
            if name != op.name:
                renamed[op.name] = name
    _keep(graph, [op.name for op in graph.op if op.name not in renamed])


PASSES: dict[str, Callable[[Any], None]] = {
    # before constants are shared
    "normalise_over_int32": normalise_over_int32,
    "drop_same_dtype_casts": drop_same_dtype_casts,
    "remove_dead_ops": remove_dead_ops,
    "merge_equal_constants": merge_equal_constants,
    "merge_equal_shapes": merge_equal_shapes,
    "rotate_any_width": rotate_any_width,
    "write_fresh_tensors": write_fresh_tensors,
    "drop_what_is_not_asked": drop_what_is_not_asked,
    "describe_dtypes": describe_dtypes,
}


def run_passes(graph: Any, names: Iterable[str]) -> None:
    """Apply the named passes in the order of PASSES."""
    wanted = set(names)
    for name, function in PASSES.items():
        if name in wanted:
            function(graph)


def count_ops(graph: Any) -> dict[str, int]:
    """Operators by kind, as `runtime.ops` tells them apart."""
    return count_kinds(op.type for op in graph.op)
