"""A GE graph as plain data: nodes in execution order with resolved inputs, ready for an executor or for counting."""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..dtypes import BY_PROTO
from ..errors import ArtifactError
from .ops import CONSTANT, CONTROL, INPUTS, OUTPUT
from .proto import parse_graph

_MAX_DIMENSIONS = 16
# a producer's name, and its output or -1: a control edge, an order and not a value
_EDGE = re.compile(r"(.+):(-1|[0-9]{1,9})", re.DOTALL | re.ASCII)


@dataclass(frozen=True)
class Constant:
    """A tensor inside the graph: little-endian bytes in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True)
class Node:
    """One operator. Inputs are (producer's name, output index), None where an optional input is not fed; `after` names
    the operators that only have to run before it: the control edges, wherever they stood among the inputs."""

    name: str
    op: str
    inputs: tuple[tuple[str, int] | None, ...]
    after: tuple[str, ...]
    outputs: int
    proto: Any
    constant: Constant | None = None

    @cached_property
    def attributes(self) -> dict[str, Any]:
        """Plain values of the operator's attributes, converted at first use: loading a graph reads few of them."""
        return {key: attribute_value(value) for key, value in self.proto.attr.items() if not key.startswith("_")}

    @property
    def where(self) -> str:
        return f"{self.op} {self.name}"

    @property
    def first(self) -> tuple[str, int] | None:
        """The first input: the memory that an in-place operator writes, and that a view shows."""
        return self.inputs[0] if self.inputs else None

    @property
    def producers(self) -> tuple[str, ...]:
        """All that has to run before it: what it reads, then what it only comes after."""
        return (*(edge[0] for edge in self.inputs if edge is not None), *self.after)


@dataclass(frozen=True)
class GeGraph:
    """Nodes in an order in which every producer comes before its consumers."""

    name: str
    nodes: tuple[Node, ...]

    @cached_property
    def inputs(self) -> tuple[Node, ...]:
        """The Data nodes by index."""
        inputs = sorted((n for n in self.nodes if n.op in INPUTS), key=lambda n: n.attributes["index"])
        if [n.attributes["index"] for n in inputs] != list(range(len(inputs))):
            raise ArtifactError(f"graph {self.name}: its inputs are not numbered 0 to {len(inputs) - 1}")
        return tuple(inputs)

    @cached_property
    def output(self) -> Node:
        outputs = [node for node in self.nodes if node.op == OUTPUT]
        if len(outputs) != 1:
            raise ArtifactError(f"graph {self.name}: has {len(outputs)} NetOutput nodes, expected 1")
        return outputs[0]


def attribute_value(value: Any) -> Any:
    """The plain value of a ge.proto.AttrDef; None where it has none."""
    kind = value.WhichOneof("value")
    if kind == "list":
        return list(value.list.i) or list(value.list.f) or list(value.list.s)
    if kind == "s":
        return value.s.decode("utf-8", "replace")
    return getattr(value, kind) if kind else None


def _constant(op: Any, where: str) -> Constant:
    tensor = op.attr["value"].t
    dtype = BY_PROTO.get(tensor.desc.dtype)
    if dtype is None:
        raise ArtifactError(f"{where}: constant {op.name} has the unsupported dtype {tensor.desc.dtype}")
    shape = tuple(tensor.desc.shape.dim)
    if len(shape) > _MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise ArtifactError(f"{where}: constant {op.name} has the shape {list(shape)[:_MAX_DIMENSIONS]}")
    count = math.prod(shape)
    if count * dtype.bytes != len(tensor.data):
        raise ArtifactError(
            f"{where}: constant {op.name} of shape {list(shape)} {dtype.name} has {len(tensor.data)} bytes, "
            f"expected {count * dtype.bytes}"
        )
    # with a 0 among them the product says nothing, and an engine still multiplies the others
    if math.prod(max(size, 1) for size in shape) >= 1 << 60:
        raise ArtifactError(f"{where}: constant {op.name} has the impossible shape {list(shape)}")
    return Constant(dtype.name, shape, tensor.data)


def _edges(op: Any, where: str) -> tuple[tuple[tuple[str, int] | None, ...], tuple[str, ...]]:
    """An operator's inputs, and the producers of its control edges."""
    inputs: list[tuple[str, int] | None] = []
    after = []
    for text in op.input:
        if not text:
            inputs.append(None)
            continue
        match = _EDGE.fullmatch(text)
        if match is None:
            raise ArtifactError(f"{where}: {op.name}: malformed input {text[:80]!r}")
        if match[2] == CONTROL:
            after.append(match[1])
        else:
            inputs.append((match[1], int(match[2])))
    return tuple(inputs), tuple(after)


def _ordered(nodes: dict[str, Node], where: str) -> tuple[Node, ...]:
    """Depth-first topological order from the nodes as listed; control edges count. Refuses cycles."""
    done: dict[str, None] = {}
    for start in nodes:
        stack, open_nodes = [(start, iter(nodes[start].producers))], {start}
        if start in done:
            continue
        while stack:
            name, producers = stack[-1]
            for producer in producers:
                if producer in done:
                    continue
                if producer not in nodes:
                    raise ArtifactError(f"{where}: {nodes[name].where} reads {producer!r}, which no node produces")
                if producer in open_nodes:
                    raise ArtifactError(f"{where}: {nodes[name].where} is part of a cycle")
                open_nodes.add(producer)
                stack.append((producer, iter(nodes[producer].producers)))
                break
            else:
                stack.pop()
                open_nodes.discard(name)
                done[name] = None
    return tuple(nodes[name] for name in done)


def read_graph(data: bytes, where: str) -> GeGraph:
    """Parse graph.pb. Raises ArtifactError for anything that is not a well-formed, acyclic graph."""
    proto = parse_graph(data, where)
    nodes: dict[str, Node] = {}
    for op in proto.op:
        if op.name in nodes:
            raise ArtifactError(f"{where}: two nodes are called {op.name!r}")
        inputs, after = _edges(op, where)
        nodes[op.name] = Node(
            name=op.name,
            op=op.type,
            inputs=inputs,
            after=after,
            outputs=len(op.output_desc),
            proto=op,
            constant=_constant(op, where) if op.type == CONSTANT else None,
        )
    for node in nodes.values():
        if node.op in INPUTS and type(node.attributes.get("index")) is not int:
            raise ArtifactError(f"{where}: input {node.name!r} has no index")
        if any(name in nodes and nodes[name].op == OUTPUT for name in node.producers):
            raise ArtifactError(f"{where}: {node.where} reads the graph's output")
        for edge in node.inputs:
            if edge and edge[0] in nodes and edge[1] >= max(nodes[edge[0]].outputs, 1):
                raise ArtifactError(f"{where}: {node.where} reads output {edge[1]} of {nodes[edge[0]].where}")
    return GeGraph(proto.name, _ordered(nodes, where))
