"""Shapes and dtypes of everything in a GE graph, for given shapes of its inputs, by the operators' rules.

Plain Python, so that looking into an artifact imports no engine. A test holds the rules and what the operators' kernels
compute together, operator by operator.
"""

import struct
from collections.abc import Iterable, Mapping
from math import prod

from ...artifacts.errors import ArtifactError
from ...artifacts.ge.graph import Constant, GeGraph, Node
from ...artifacts.ge.ops import OUTPUT
from ...runtime.ops import OPERATORS, computed
from ...runtime.ops.base import Specs, TensorSpec
from ...runtime.ops.graphs import Op, live_ops
from ...runtime.ops.shapes import MOST_VALUES, Misfit

_INTEGERS = {"int32": "i", "int64": "q"}


def graph_ops(graph: GeGraph) -> list[Op]:
    """The graph's operators, in order, as `runtime.ops.graphs` counts them."""
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
        operator = OPERATORS.get(node.op)
        if operator is None or operator.shape is None:
            raise ArtifactError(f"{where}: {node.where} has no shape rule; there are rules for {', '.join(computed())}")
        given = node_inputs(node, specs)
        try:
            specs[node.name] = operator.outputs(node, given)
        except (Misfit, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            shown = ", ".join("-" if spec is None else str(spec) for spec in given)
            raise ArtifactError(f"{where}: {node.where} does not take ({shown}): {error}") from error
    return specs


def _constant(constant: Constant) -> TensorSpec:
    code = _INTEGERS.get(constant.dtype)
    count = prod(constant.shape)
    values = struct.unpack(f"<{count}{code}", constant.data) if code and count <= MOST_VALUES else None
    return TensorSpec(constant.dtype, constant.shape, values)
