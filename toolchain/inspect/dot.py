"""One layer of a graph as Graphviz text, for a person to look at: `dot -Tsvg layer.dot -o layer.svg`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...artifacts.errors import TargetError
from ...artifacts.ge.binding import CACHE, PARAMETER, Binding, BoundInput
from ...artifacts.ge.graph import GeGraph, Node
from ...artifacts.ge.ops import INPUTS
from ...runtime.ops import known
from ...runtime.ops.base import DEVICE, Specs
from .shapes import live_nodes

# model.layers.3.mlp.down_proj.weight, visual.blocks.3.attn.qkv.weight
_LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
_STYLES = {
    "device": "shape=box, style=filled, fillcolor=lightblue",
    "layout": 'shape=box, style="rounded,dashed"',
    "shape": "shape=box, style=dotted",
    "outside": "shape=ellipse, color=gray40, fontcolor=gray30",
    "cache": "shape=cylinder",
}


@dataclass(frozen=True)
class Drawing:
    """DOT text, and how many device operators are in it."""

    text: str
    layer: int
    device_ops: int


def layers_of(graph: GeGraph, binding: Binding) -> dict[str, int]:
    """The layer of every live operator that belongs to one.

    An operator with a parameter is in the layer that the parameter's name says; one without, where its producers are:
    so a norm that is fused with the addition before it opens the layer whose parameter it has.
    """
    parameters = {
        node.name: bound for node, bound in zip(graph.inputs, binding.inputs, strict=True) if bound.kind == PARAMETER
    }
    layers: dict[str, int] = {}
    for node in live_nodes(graph):
        producers = [edge[0] for edge in node.inputs if edge is not None]
        names = [parameters[producer].name for producer in producers if producer in parameters]
        if names:
            matches = [match for match in map(_LAYER.search, names) if match]
            numbers = [int(match[1]) for match in matches]
        else:
            numbers = [layers[producer] for producer in producers if producer in layers]
        if numbers:
            layers[node.name] = max(numbers)
    return layers


def draw_layer(graph: GeGraph, binding: Binding, specs: Mapping[str, Specs], layer: int | None = None) -> Drawing:
    """Draw one layer, counted from 0; by default the second, as the first has another norm before it.

    specs: `shapes.propagate`'s. Raises TargetError for a layer that is not there.
    """
    layers = layers_of(graph, binding)
    numbers = sorted(set(layers.values()))
    if not numbers:
        raise TargetError(f"graph {binding.graph}: no parameter names a layer, there is none to draw")
    chosen = numbers[min(1, len(numbers) - 1)] if layer is None else layer
    if chosen not in numbers:
        raise TargetError(f"--layer {chosen}: graph {binding.graph} has layers {numbers[0]} to {numbers[-1]}")
    inside = {node.name: node for node in live_nodes(graph) if layers.get(node.name) == chosen}
    bound = {node.name: each for node, each in zip(graph.inputs, binding.inputs, strict=True)}
    body = [_node(name, _operator_label(node, specs, bound), known(node.op).kind) for name, node in inside.items()]
    body += _edges(graph, inside, specs, bound, layers)
    lines = [
        f"digraph {_quoted(f'{binding.graph}, layer {chosen}')} {{",
        "  rankdir=TB;",
        '  node [fontname="Helvetica", fontsize=11];',
        '  edge [fontname="Helvetica", fontsize=9];',
        f"  label={_quoted(f'{binding.graph}, layer {chosen}')};",
        *(f"  {line}" for line in dict.fromkeys(body)),
        "}",
    ]
    device = sum(known(node.op).kind == DEVICE for node in inside.values())
    return Drawing("\n".join(lines) + "\n", chosen, device)


def _quoted(text: str) -> str:
    """A DOT string: \\n stays a line break, everything else is literal."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _node(name: str, label: str, kind: str) -> str:
    return f"{_quoted(name)} [label={_quoted(label)}, {_STYLES[kind]}];"


def _edge(source: str, target: str, label: str) -> str:
    return f"{_quoted(source)} -> {_quoted(target)} [label={_quoted(label)}];"


def _shape(name: str, output: int, specs: Mapping[str, Specs]) -> str:
    return str(list(specs[name][output].shape))


def _operator_label(node: Node, specs: Mapping[str, Specs], bound: Mapping[str, BoundInput]) -> str:
    """The operator's type, its parameters with their shapes, and the shapes that it makes."""
    lines = [node.op]
    for edge in node.inputs:
        if edge is not None and edge[0] in bound and bound[edge[0]].kind == PARAMETER:
            lines.append(f"{bound[edge[0]].name} {list(bound[edge[0]].shape)}")
    made = [f"{spec.dtype} {list(spec.shape)}" for spec in specs[node.name]]
    return "\n".join([*lines, "-> " + ", ".join(made)])


def _edges(
    graph: GeGraph,
    inside: Mapping[str, Node],
    specs: Mapping[str, Specs],
    bound: Mapping[str, BoundInput],
    layers: Mapping[str, int],
) -> Iterable[str]:
    """Edges within the layer, and those that cross its border, with a node for what is on the other side."""
    by_name = {node.name: node for node in live_nodes(graph)}
    for name, node in inside.items():
        for edge in node.inputs:
            # parameters stand in the operators' labels, and the constants of a Reshape in its result
            if edge is None or by_name[edge[0]].constant is not None or _is_parameter(edge[0], bound):
                continue
            if edge[0] not in inside:
                yield _source(by_name[edge[0]], bound, layers)
            yield _edge(edge[0], name, _shape(edge[0], edge[1], specs))
    for name, node in by_name.items():
        for edge in node.inputs:
            if name not in inside and edge is not None and edge[0] in inside:
                yield _node(f"to {name}", f"{_place(name, layers)}: {node.op}", "outside")
                yield _edge(edge[0], f"to {name}", _shape(edge[0], edge[1], specs))


def _is_parameter(name: str, bound: Mapping[str, BoundInput]) -> bool:
    return name in bound and bound[name].kind == PARAMETER


def _place(name: str, layers: Mapping[str, int]) -> str:
    return f"layer {layers[name]}" if name in layers else "outside the layers"


def _source(node: Node, bound: Mapping[str, BoundInput], layers: Mapping[str, int]) -> str:
    """A node for what a layer reads: the cache, an argument or constant, or an operator elsewhere."""
    if node.op in INPUTS:
        each = bound[node.name]
        if each.kind == CACHE:
            return _node(node.name, f"{each.name}[{each.index}]\n{each.dtype} {list(each.shape)}", "cache")
        return _node(node.name, f"{each.kind}\n{each.name}", "outside")
    return _node(node.name, f"{_place(node.name, layers)}: {node.op}", "outside")
