"""Places in a GE graph that have a counterpart in transformers, found through the binding and not by names.

A parameter's `Data` input has one consumer, and that is the module which owns it: its first data input and its output
are the module's. So the landmarks stay where they are whatever torchair calls its nodes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ...artifacts.ge.binding import CACHE, PARAMETER, Binding
from ...artifacts.ge.graph import GeGraph, Node
from ...runtime.models import family_of
from ...runtime.models.base import Role, Weight
from ...runtime.models.config import ModelConfig
from ...runtime.ops import known
from ...runtime.ops.base import DATA, LAYOUT
from ..weights.names import new_name

# Operators that a weight belongs to; the first input is what they work on.
_OWNERS = ("MatMul", "LayerNormV4", "RmsNorm")
# A norm with the addition before it: output 0 is the normalised sum, the sum itself, the residual stream, is this one.
_SUMS = {"AddRmsNorm": 2, "AddLayerNorm": 3}
INPUT, OUTPUT, KEYS = "input", "output", "keys"
# transformers' name of the output layer, also of one that is tied
_HEAD = "lm_head"


@dataclass(frozen=True)
class Landmark:
    """One tensor: output `index` of operator `node`. `owner` is a parameter's name without its last part, or a layer's
    number for the keys written to the cache; side is INPUT, OUTPUT or KEYS; reads says what the input is.
    """

    owner: str
    side: str
    node: str
    index: int
    reads: str = ""

    @property
    def title(self) -> str:
        name = self.owner.removeprefix("model.")
        if self.side == KEYS:
            return f"layers.{name}.self_attn: keys after the rotary embedding"
        if self.side == OUTPUT:
            return name
        return f"the input of {name}" + (f" ({self.reads})" if self.reads else "")


def find_landmarks(graph: GeGraph, binding: Binding, config: ModelConfig) -> list[Landmark]:
    """All landmarks of one graph, in the order in which it computes them."""
    position = {node.name: i for i, node in enumerate(graph.nodes)}
    running = {node.name for node in graph.nodes if known(node.op).kind != DATA}
    readers: dict[str, list[Node]] = {}
    for node in graph.nodes:
        for edge in node.inputs:
            if edge is not None:
                readers.setdefault(edge[0], []).append(node)
    marked: dict[tuple[str, int], Landmark] = {}
    weights = {each.name: each for each in family_of(config).weights(config) if each.name.endswith(".weight")}
    for bound, data in zip(binding.inputs, graph.inputs, strict=True):
        marks: Iterable[Landmark] = ()
        if bound.kind == PARAMETER and bound.name in weights:
            marks = (mark for node in _users(data, readers) for mark in _around(node, weights[bound.name]))
        elif bound.kind == CACHE and bound.name == "keys":
            marks = (
                Landmark(str(bound.index), KEYS, *node.inputs[2])
                for node in readers.get(data.name, ())
                if node.op == "Scatter" and len(node.inputs) > 2 and node.inputs[2]
            )
        for mark in marks:
            edge = (mark.node, mark.index)
            # one tensor can be a module's output and the next one's input: the one that made it gives its name
            if mark.node in running and (edge not in marked or mark.side == OUTPUT):
                marked[edge] = mark
    # a norm's sum is there before its output 0
    return sorted(marked.values(), key=lambda mark: (position[mark.node], -mark.index))


def _users(data: Node, readers: dict[str, list[Node]]) -> Iterator[Node]:
    """The operators that compute with an input, layout operators between them skipped."""
    waiting = list(reversed(readers.get(data.name, ())))
    while waiting:
        node = waiting.pop()
        if known(node.op).kind == LAYOUT or known(node.op).transposes:
            waiting += reversed(readers.get(node.name, ()))
        else:
            yield node


def _around(node: Node, weight: Weight) -> Iterator[Landmark]:
    """What goes into and comes out of the operator that has a weight."""
    owner = weight.owner
    if node.op in _SUMS:
        yield Landmark(owner, INPUT, node.name, _SUMS[node.op], weight.reads)
        yield Landmark(owner, OUTPUT, node.name, 0)
    elif node.op in _OWNERS:
        # a tied head has the embedding's weight
        name = _HEAD if node.op == "MatMul" and weight.role is Role.EMBEDDING else owner
        # patches are uint8 here and normalised in transformers: only the embedding's output is the same
        if (edge := node.first) and weight.role is not Role.PATCHES:
            yield Landmark(name, INPUT, *edge, weight.reads)
        yield Landmark(name, OUTPUT, node.name, 0)
    elif node.op == "GatherV2":
        yield Landmark(owner, OUTPUT, node.name, 0)


def original_modules(landmarks: Iterable[Landmark], config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Paths of transformers' modules that compute a landmark's owner together, by owner."""
    weights = {each.owner: each for each in family_of(config).weights(config) if each.name.endswith(".weight")}
    owners = {mark.owner for mark in landmarks if mark.side != KEYS}
    modules = {
        owner: tuple(new_name(part.name.rpartition(".")[0]) for part in weights[owner].parts)
        for owner in owners & weights.keys()
    }
    if _HEAD in owners:
        modules[_HEAD] = (_HEAD,)
    return modules


def aligned(ours: Tensor, original: Tensor, row: int) -> tuple[Tensor, Tensor] | None:
    """The rows that both have. The prefill graph's last layer keeps the last token only; decode has a row a request."""
    if ours.shape[-1] != original.shape[-1]:
        return None
    if ours.shape[0] != original.shape[0]:
        if ours.shape[0] == 1:
            original = original[-1:]
        elif original.shape[0] == 1 and row < ours.shape[0]:
            ours = ours[row : row + 1]
        else:
            return None
    return ours, original
