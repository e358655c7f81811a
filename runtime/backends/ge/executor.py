"""Runs a GE graph on CPU: every operator is resolved when the graph is loaded, then a plain ordered loop."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....artifacts.errors import ArtifactError
from ....artifacts.ge.graph import GeGraph, Node
from ....artifacts.ge.ops import INPUTS, OUTPUT
from ....artifacts.soc import DEFAULT_SOC
from ...dtypes import torch_dtype
from ...ops import kernel_of
from ...ops.graphs import written_by
from ...ops.kernel import Kernel

Observer = Callable[[str, tuple[Tensor, ...]], None]


@dataclass(frozen=True)
class _Step:
    node: Node
    function: Kernel
    inputs: tuple[tuple[int, int] | None, ...]
    slot: int
    # slots whose last reader this step is
    dead: tuple[int, ...]


class Executor:
    """One graph, ready to run. Raises ArtifactError at construction for an operator it does not know, and for one that
    writes into a constant.

    soc: whose kernels are computed, where they differ. lookup: where a node's function comes from.
    """

    def __init__(
        self,
        graph: GeGraph,
        where: str,
        *,
        soc: str = DEFAULT_SOC,
        lookup: Callable[[Node, str, str], Kernel] = kernel_of,
    ) -> None:
        self.name = graph.name
        slots: dict[str, int] = {node.name: i for i, node in enumerate(graph.nodes)}
        self._inputs = [slots[node.name] for node in graph.inputs]
        self._output = graph.output
        self._outputs = [(slots[e[0]], e[1]) for e in graph.output.inputs if e is not None]
        self._constants = {
            slots[node.name]: (_constant_tensor(node),) for node in graph.nodes if node.constant is not None
        }
        kept = {slot for slot, _ in self._outputs} | set(self._inputs) | set(self._constants)
        last_reader: dict[int, str] = {}
        running = [n for n in graph.nodes if n.op not in (*INPUTS, OUTPUT) and slots[n.name] not in self._constants]
        for node in running:
            for edge in node.inputs:
                if edge is not None:
                    last_reader[slots[edge[0]]] = node.name
        dead: dict[str, list[int]] = {}
        for slot, name in last_reader.items():
            if slot not in kept:
                dead.setdefault(name, []).append(slot)
        self._steps = [
            _Step(
                node,
                lookup(node, where, soc),
                tuple((slots[e[0]], e[1]) if e else None for e in node.inputs),
                slots[node.name],
                tuple(dead.get(node.name, ())),
            )
            for node in running
        ]
        self._size = len(graph.nodes)
        written_by(graph, where)  # refuses writing into constants

    def run(self, inputs: Sequence[Tensor], observer: Observer | None = None) -> list[Tensor]:
        """Execute the graph on `inputs`, in the order of its Data nodes; cache inputs are updated in place.

        observer, where given, is called with every operator's name and outputs: nothing is freed early then.
        Raises ArtifactError naming the operator and what it was given when one cannot run.
        """
        if len(inputs) != len(self._inputs):
            raise ArtifactError(f"graph {self.name}: got {len(inputs)} inputs, expected {len(self._inputs)}")
        values: list[tuple[Tensor, ...] | None] = [None] * self._size
        for slot, constant in self._constants.items():
            values[slot] = constant
        for slot, tensor in zip(self._inputs, inputs, strict=True):
            values[slot] = (tensor,)
        with torch.inference_mode():
            for step in self._steps:
                arguments = [None if e is None else self._value(values, *e, step.node) for e in step.inputs]
                try:
                    outputs = step.function(step.node, *arguments)
                except ArtifactError as error:
                    raise ArtifactError(f"graph {self.name}: {error}") from error
                values[step.slot] = outputs
                if observer is not None:
                    observer(step.node.name, outputs)
                else:
                    for slot in step.dead:
                        values[slot] = None
        return [self._value(values, slot, index, self._output) for slot, index in self._outputs]

    def _value(self, values: Sequence[tuple[Tensor, ...] | None], slot: int, index: int, reader: Node) -> Tensor:
        """One output of an operator that ran. Its description may claim more outputs than it has."""
        outputs = values[slot]
        if outputs is None or index >= len(outputs):
            count = 0 if outputs is None else len(outputs)
            raise ArtifactError(
                f"graph {self.name}: {reader.where} reads output {index} of an operator that has {count}"
            )
        return outputs[index]


def _constant_tensor(node: Node) -> Tensor:
    constant = node.constant
    if constant is None:
        raise ArtifactError(f"{node.where} has no value")
    if not constant.data:
        return torch.empty(constant.shape, dtype=torch_dtype(constant.dtype))
    flat = torch.frombuffer(bytearray(constant.data), dtype=torch_dtype(constant.dtype))
    return flat.reshape(constant.shape)
