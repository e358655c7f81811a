"""The facts of a node that rules ask for, by name.

in.NAME.fed, .described, .const, .dtype, .rank, .size, .dimK (from the end where negative), .values of a small
constant; out.K.dtype; attr.NAME, or the operator's default. graph.static, graph.tiling_schedule, graph.operators. Of
attention: layout, heads, kv_heads as written, b (rows), q_s and kv_s (tokens a row), d and d_v (width of a head of the
query, of the value).
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ...artifacts.ge.binding import Binding
from ...artifacts.ge.graph import GeGraph, Node
from ...runtime.ops import known
from ...runtime.ops.base import Specs, TensorSpec
from ..inspect.shapes import node_inputs

_DIMENSION = re.compile(r"dim(-?\d+)", re.ASCII)
_KEYS = ("key", "key0")
_VALUES = ("value", "value0")


@dataclass(frozen=True)
class GraphFacts:
    """What rules ask of a graph. static: no size is left to run time."""

    operators: frozenset[str] = frozenset()
    static: bool = False
    tiling_schedule: bool = False


@dataclass(frozen=True)
class NodeFacts:
    """One node at known sizes. inputs holds every input that is described, by name, None where it is not fed."""

    op: str
    inputs: Mapping[str, TensorSpec | None]
    outputs: Specs = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: frozenset[str] = frozenset()
    graph: GraphFacts = GraphFacts()

    def __call__(self, name: str) -> Any:
        """The fact called `name`; None if the node does not have it."""
        head, _, rest = name.partition(".")
        if head == "in":
            return self._input(*rest.rpartition(".")[::2])
        if head == "out":
            index = int(rest.partition(".")[0])
            return self.outputs[index].dtype if index < len(self.outputs) else None
        if head == "attr":
            operator = known(self.op)
            return self.attributes.get(rest, operator.defaults.get(rest, operator.unwritten.get(rest)))
        if head == "graph":
            return getattr(self.graph, rest)
        return self._attention.get(name)

    def _input(self, name: str, what: str) -> Any:
        if what == "described":
            return name in self.inputs
        if what == "const":
            return name in self.constants
        spec = self.inputs.get(name)
        if what == "fed":
            return spec is not None
        if spec is None:
            return None
        if dimension := _DIMENSION.fullmatch(what):
            index = int(dimension[1])
            return spec.shape[index] if -len(spec.shape) <= index < len(spec.shape) else None
        facts = {"dtype": spec.dtype, "rank": len(spec.shape), "size": prod(spec.shape), "values": spec.values}
        return facts.get(what)

    @functools.cached_property
    def _attention(self) -> dict[str, Any]:
        query = self.inputs.get("query")
        key = next((spec for name in _KEYS if (spec := self.inputs.get(name))), None)
        value = next((spec for name in _VALUES if (spec := self.inputs.get(name))), None)
        if not known(self.op).attention or not query or not key or not value or len(query.shape) != 3:
            return {}
        heads, kv_heads = self("attr.num_heads"), self("attr.num_key_value_heads")
        facts = {"layout": self("attr.input_layout"), "heads": heads, "kv_heads": kv_heads}
        if facts["layout"] == "TND":
            # every sequence in one row of tokens: there are no rows to count
            return {**facts, "d": query.shape[2], "d_v": value.shape[2], "q_s": query.shape[0], "kv_s": key.shape[0]}
        widths = {}
        if heads:
            widths = {"d": query.shape[2] // heads, "d_v": value.shape[2] // (kv_heads or heads)}
        return {**facts, **widths, "b": query.shape[0], "q_s": query.shape[1], "kv_s": key.shape[1]}


def graph_facts(graph: GeGraph, binding: Binding) -> GraphFacts:
    """What rules ask of the graph."""
    return GraphFacts(
        operators=frozenset(node.op for node in graph.nodes),
        static=all(-1 not in bound.shape for bound in binding.inputs),
        tiling_schedule=binding.local_options.get("ge.tiling_schedule_optimize") == "1",
    )


def node_facts(node: Node, specs: Mapping[str, Specs], constants: frozenset[str], graph: GraphFacts) -> NodeFacts:
    """The facts of a node whose inputs and outputs have `specs`; constants: the names of the graph's constants."""
    names = [description.name for description in node.proto.input_desc]
    return NodeFacts(
        op=node.op,
        inputs=dict(zip(names, node_inputs(node, specs), strict=False)),
        outputs=specs[node.name],
        attributes=node.attributes,
        constants=frozenset(
            name for name, edge in zip(names, node.inputs, strict=False) if edge and edge[0] in constants
        ),
        graph=graph,
    )
