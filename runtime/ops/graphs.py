"""What a graph's operators count as, which of them live and which inputs they write: for passes, checks, reports."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ...artifacts.errors import ArtifactError
from ...artifacts.ge.graph import GeGraph, Node
from ...artifacts.ge.ops import CONSTANT, CONTROL, FILE_CONSTANT, INPUTS, OUTPUT
from . import known
from .base import DATA, DEVICE, LAYOUT, SHAPE


@dataclass(frozen=True)
class Op:
    """One operator of a graph; `inputs` are the names of its producers, None where an optional input is not fed, and
    `after` the operators that only have to run before it."""

    name: str
    type: str
    inputs: tuple[str | None, ...]
    after: tuple[str, ...] = ()

    @property
    def first(self) -> str | None:
        """What makes the first input: the memory that an in-place operator writes, and that a view shows."""
        return self.inputs[0] if self.inputs else None


def op_of(name: str, op_type: str, edges: Iterable[str]) -> Op:
    """An operator from its edges as a graph's file has them: `producer:output`, empty for an input that is not fed, and
    `producer:-1` for a control edge, which is an order and no input wherever it stands among them."""
    inputs: list[str | None] = []
    after = []
    for edge in edges:
        producer, _, output = edge.rpartition(":")
        if output == CONTROL:
            after.append(producer)
        else:
            inputs.append(producer or None)
    return Op(name, op_type, tuple(inputs), tuple(after))


def count_kinds(op_types: Iterable[str]) -> dict[str, int]:
    """How many operators: total, and by kind."""
    kinds = Counter(known(op_type).kind for op_type in op_types)
    return {"total": kinds.total(), **{kind: kinds[kind] for kind in (DEVICE, SHAPE, LAYOUT, DATA)}}


def _writes_input(op: Op | None, by_name: dict[str, Op]) -> bool:
    """Whether an in-place operator writes into an input of the graph, so that the caller sees it."""
    while op is not None and (known(op.type).writes or known(op.type).view):
        op = by_name.get(op.first or "")
    return op is not None and op.type in INPUTS


def live_ops(ops: Iterable[Op]) -> set[str]:
    """Names of the operators that reach NetOutput or write into an input; inputs always: they are the signature."""
    by_name = {op.name: op for op in ops}
    live: set[str] = set()
    open_names: list[str] = [
        op.name
        for op in by_name.values()
        if op.type in (*INPUTS, OUTPUT) or (known(op.type).writes and _writes_input(op, by_name))
    ]
    while open_names:
        name = open_names.pop()
        if name not in live:
            live.add(name)
            op = by_name[name]
            open_names += [producer for producer in (*op.inputs, *op.after) if producer is not None]
    return live


def input_behind(producer: str | None, by_name: dict[str, Op]) -> str | None:
    """The input of the graph that `producer` hands on, seen through operators that only change its shape; else None."""
    op = by_name.get(producer or "")
    while op is not None and known(op.type).kind == LAYOUT:
        op = by_name.get(op.first or "")
    return op.name if op is not None and op.type in INPUTS else None


def device_ops_per_layer(ops_in_order: Iterable[Op]) -> int | None:
    """Device operators from one layer's attention up to the next one's: a layer's worth, wherever layers begin.

    None with fewer than two layers, or if they differ.
    """
    spans: set[int] = set()
    count: int | None = None
    for op in ops_in_order:
        if known(op.type).attention:
            if count is not None:
                spans.add(count)
            count = 0
        if count is not None and known(op.type).kind == DEVICE:
            count += 1
    return spans.pop() if len(spans) == 1 else None


def written_by(graph: GeGraph, where: str) -> list[Node]:
    """The inputs of the graph that its in-place operators write into.

    Raises ArtifactError for one that writes into a constant: those may be read-only memory.
    """
    by_name = {node.name: node for node in graph.nodes}
    inputs = []
    for node in graph.nodes:
        root = node
        while known(root.op).hands_on and root.first is not None:
            root = by_name[root.first[0]]
        if known(node.op).writes and root.op in INPUTS:
            inputs.append(root)
        elif known(node.op).writes and root.op in (CONSTANT, FILE_CONSTANT):
            raise ArtifactError(f"{where}: {node.where} writes into the constant {root.name!r}; rebuild the artifact")
    return inputs
