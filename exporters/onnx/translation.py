"""A GE graph as an ONNX model, operator by operator, of whatever model: what it computes, the graph alone says.

A value is translated when something asks for it: the products and attentions in the graph's order, then the outputs.
Activations are fp32 whatever the graph's dtype: Casts between floats are left out.

Rows. A graph over a cache is traced for one row; its model takes as many as it is given. Where the runtime's interface
gives an argument one more free size than the graph (token_ids [rows, tokens] for [tokens]), that argument is flattened,
and each size of the graph that counts tokens counts rows x tokens. Where the graph has its one row as a size of its
own, in front of its tokens, there the model has all rows: a Reshape to [1, -1, ...] is one to [rows, tokens, ...]. An
argument of that one row ([1], such as `last`) picks by token in every row, the same of each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import TargetError
from ...artifacts.ge.binding import ARGUMENT, CACHE, CONSTANT, PARAMETER, Binding, BoundInput
from ...artifacts.ge.graph import GeGraph, Node
from ...artifacts.manifest import Tensor
from .linear import Linears

Edge = tuple[str, int]
Function = Callable[["Translation", Node], Sequence[str]]
# the operators with weights of their own, and those that read what they made: the rest hangs on them
_ANCHORS = ("MatMul", "FusedInferAttentionScore")
_NUMPY = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32, "int32": np.int32, "int64": np.int64}
_FLOATS = ("fp32", "fp16", "bf16")


class Translation:
    """A graph while it is translated into the model of `linears`, with the inputs and outputs that the runtime feeds
    and reads; other outputs of the graph are left out.

    constants: the tables that the binding names, floats in fp32. functions: operators.OPERATORS, which are given this.
    Raises TargetError for an operator, or a use of one, that has no translation.
    """

    def __init__(
        self,
        graph: GeGraph,
        binding: Binding,
        linears: Linears,
        constants: Mapping[str, NDArray[Any]],
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        functions: Mapping[str, Function],
    ) -> None:
        self.graph, self.linears, self.writer, self.constants = graph, linears, linears.graph, constants
        self.standard = linears.form.standard_only
        self.nodes = {node.name: node for node in graph.nodes}
        self.bound = {node.name: bound for node, bound in zip(graph.inputs, binding.inputs, strict=True)}
        self.cached = any(bound.kind == CACHE for bound in binding.inputs)
        self._functions = functions
        self._interface = {tensor.name: tensor for tensor in inputs}
        names = [output.name for output in binding.outputs]
        self._outputs: dict[Edge, str] = {
            edge: name
            for name, edge in zip(names, graph.output.inputs, strict=True)
            if edge and name in _names(outputs)
        }
        self._values: dict[Edge, str] = {}
        # values as [rows, tokens, width], by the shape that says how many rows and tokens there are
        self.by_row: dict[tuple[Edge, str], str] = {}
        # tables of angles in that form, see `rotary`
        self.tables: dict[tuple[Any, str], str] = {}
        self.resolved: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self.writer.declare(inputs, outputs)
        made = set(self._outputs.values()) | {name for name in _names(outputs) if name.startswith("present_")}
        if missing := sorted(_names(outputs) - made):
            raise TargetError(f"graph {graph.name}: has no output {missing[0]}, which the runtime reads")

    def run(self) -> None:
        for node in self.graph.nodes:
            if node.op in _ANCHORS:
                self.value((node.name, 0))
        for edge in self._outputs:
            self.value(edge)

    def edge(self, node: Node, number: int) -> Edge:
        """An input of a node. Raises TargetError where it is not fed."""
        edge = node.inputs[number] if number < len(node.inputs) else None
        if edge is None:
            raise self.refused(node, f"input {number} is not fed, and its translation needs it")
        return edge

    def behind(self, node: Node, number: int) -> Node:
        """What makes an input of a node."""
        return self.nodes[self.edge(node, number)[0]]

    def inputs(self, node: Node, begin: int = 0, end: int | None = None) -> list[str]:
        """The ONNX values of a node's inputs, of all or of a range."""
        return [self.value(self.edge(node, i)) for i in range(len(node.inputs))[begin:end]]

    def value(self, edge: Edge) -> str:
        """The ONNX value of an output of a node."""
        if edge not in self._values:
            node = self.nodes[edge[0]]
            for number, name in enumerate(self._translated(node)):
                self._values[node.name, number] = name
        if not (found := self._values.get(edge)):
            raise self.refused(self.nodes[edge[0]], f"its output {edge[1]} has no translation")
        return found

    def _translated(self, node: Node) -> Sequence[str]:
        if node.name in self.bound:
            return (self._input(node, self.bound[node.name]),)
        if node.constant is not None:
            return (self.writer.constant(node.name, self._constant(node), None),)
        function = self._functions.get(node.op)
        if function is None:
            raise self.refused(
                node,
                f"has no translation to ONNX, there are those of {', '.join(sorted(self._functions))}; run the "
                "artifact's GE graphs, or add a function to exporters/onnx/operators.py",
            )
        try:
            return function(self, node)
        # a graph may have anything for an attribute, and a binding any name
        except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise self.refused(node, f"cannot be translated with {node.attributes}: {reason}") from error

    def _input(self, node: Node, bound: BoundInput) -> str:
        if bound.kind == PARAMETER and len(bound.shape) == 1:
            return self.linears.vector(bound.name)
        if bound.kind == CONSTANT:
            return self.writer.constant(f"constants.{bound.name}", self.constants[bound.name], None)
        declared = self._interface.get(bound.name)
        if bound.kind != ARGUMENT or declared is None:
            raise self.refused(node, f"the {bound.kind} {bound.name} is read in a way that has no translation")
        if len(declared.shape) == len(bound.shape):
            return bound.name
        return self.writer.reshape(f"{bound.name}.flat", bound.name, bound.shape)

    def refused(self, node: Node, reason: str) -> TargetError:
        """The error of a node that is not translated, to be raised by the caller."""
        return TargetError(f"graph {self.graph.name}: {node.where}: {reason}")

    def name(self, node: Node, default: str | None = None) -> str:
        """What the value that a node makes is called: an output of the model as the runtime reads it."""
        return self._outputs.get((node.name, 0)) or default or node.name

    def is_output(self, node: Node) -> bool:
        return (node.name, 0) in self._outputs

    def _constant(self, node: Node) -> NDArray[Any]:
        if node.constant is None or node.constant.dtype not in _NUMPY:
            raise self.refused(node, "is expected to be a constant of floats or integers")
        array = np.frombuffer(node.constant.data, _NUMPY[node.constant.dtype]).reshape(node.constant.shape)
        return array.astype(np.float32) if node.constant.dtype in _FLOATS else array.astype(np.int64)

    def array(self, edge: Edge) -> NDArray[Any]:
        """The value of a constant input, floats in fp32 and integers in int64."""
        return self._constant(self.nodes[edge[0]])

    def ints(self, edge: Edge) -> list[int]:
        return [int(value) for value in self.array(edge).reshape(-1)]

    def bound_as(self, edge: Edge | None, kind: str) -> BoundInput | None:
        """What the binding says of an edge that is an input of this kind, else None."""
        bound = self.bound.get(edge[0]) if edge else None
        return bound if bound is not None and bound.kind == kind else None

    def is_integer(self, edge: Edge) -> bool:
        """Whether a value is an integer argument, or a view of one."""
        node = self.nodes[edge[0]]
        while node.op in ("Reshape", "Identity"):
            node = self.behind(node, 0)
        bound = self.bound.get(node.name)
        return bound is not None and bound.dtype not in _FLOATS

    def target(self, node: Node) -> tuple[int | None, ...]:
        """The shape that a Reshape gives; None where another tensor's size says it."""
        shape = self.behind(node, 1)
        if shape.op == "Pack":
            return tuple(None if self.nodes[e[0]].op == "Gather" else self.ints(e)[0] for e in shape.inputs if e)
        return tuple(self.ints(self.edge(node, 1)))

    def shape(self, node: Node) -> str:
        """The ONNX value of the shape that a Reshape gives."""
        target = self.target(node)
        if target[:2] == (1, -1) and (argument := self._row_argument()):
            return self._sizes(argument, 2, [size for size in target[2:] if size is not None])
        sized = target.count(None)
        rest = [size for size in target[sized:] if size is not None]
        if sized + len(rest) != len(target):
            raise self.refused(node, f"a view {list(target)} has no translation")
        return self._sizes(self._sized_by(node, sized), sized, rest) if sized else self.writer.ints(rest)

    def _sizes(self, argument: str, count: int, rest: Sequence[int]) -> str:
        """A shape: the first `count` sizes of an argument of the model, then the rest."""
        sizes = f"{argument}.{'rows' if count == 2 else count}"
        name = f"{sizes}.{'.'.join(map(str, rest))}"
        if not self.writer.has(name):
            if not self.writer.has(sizes):
                self.writer.node("Shape", sizes, argument, end=count)
            self.writer.node("Concat", name, sizes, self.writer.ints(rest), axis=0)
        return name

    def rows(self) -> str | None:
        """[rows, tokens, -1] of a graph over a cache."""
        argument = self._row_argument()
        return None if argument is None else self._sizes(argument, 2, [-1])

    def rows_of(self, view: Node) -> str | None:
        """[rows, tokens, -1] of a view [rows, tokens, width], where an argument of the model says how many."""
        target = self.target(view) if view.op == "Reshape" else ()
        if len(target) != 3 or target[0] is not None or target[1] == -1 or target[2] is None:
            return None
        argument = self._sized_by(view, target.count(None))
        declared = self._interface.get(argument)
        if target[1] is not None and (declared is None or declared.shape[1] != target[1]):
            return None
        return self._sizes(argument, 2, [-1])

    def given(self, edge: Edge | None, kind: str) -> str | None:
        """The name of an edge that is an input of this kind, and of the model as well."""
        bound = self.bound_as(edge, kind)
        return bound.name if bound and bound.name in self._interface else None

    def _row_argument(self) -> str | None:
        """The first argument that has rows in the model and none in the graph."""
        for bound in self.bound.values():
            declared = self._interface.get(bound.name)
            if declared is not None and len(declared.shape) > len(bound.shape) and declared.shape[:2] == (-1, -1):
                return bound.name
        return None

    def _sized_by(self, node: Node, count: int) -> str:
        """The argument whose first `count` sizes begin the shape that a Reshape gives."""
        gathers = [self.behind(self.behind(node, 1), place) for place in range(count)]
        sizes = [(self.behind(gather, 0), self.ints(self.edge(gather, 1))) for gather in gathers]
        arguments = {self.value(self.edge(shape, 0)) for shape, _ in sizes if shape.op == "Shape"}
        if len(arguments) != 1 or [place for _, place in sizes] != [[place] for place in range(count)]:
            raise self.refused(node, "its sizes are not the first of one tensor")
        return arguments.pop()


def _names(tensors: Sequence[Tensor]) -> set[str]:
    return {tensor.name for tensor in tensors}
