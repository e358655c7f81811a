"""What GE's operators count as, and which of a graph's operators live: one classification for passes and reports."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# Patches of one run of the visual graph, padding included: what CANN's host code was run to, and the processor's own
# largest picture.
MOST_PATCHES = 1 << 16
# Sequences of one run in the TND layout, as documented.
MOST_PACKED = 4096
INPUTS = ("Data", "RefData")
OUTPUT = "NetOutput"
CONSTANT = "Const"
# the output that a control edge names
CONTROL = "-1"
# In-place operators: their effect is a write, so they live even where nothing reads their output.
WRITES = frozenset({"Scatter", "ScatterNdUpdate", "ScatterPaKvCache"})
# Their output is, or may be, the memory of their first input: on CPU by the reference backend, on the device by GE's
# choice.
VIEWS = frozenset({"Cast", "Identity", "Reshape", "SplitV", "Squeeze", "Unsqueeze"})
TRANSPOSES = frozenset({"Transpose", "TransposeD"})
# One of them a layer, in every form of every graph.
ATTENTIONS = frozenset({"FusedInferAttentionScore", "PromptFlashAttention", "IncreFlashAttention"})
_GROUPS = {
    "data": (*INPUTS, CONSTANT, "FileConstant", OUTPUT),
    "shape": ("Shape", "Gather", "Pack"),
    "layout": ("Reshape", "Unsqueeze", "Squeeze", "Identity"),
}
_KINDS = {op_type: kind for kind, group in _GROUPS.items() for op_type in group}


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


def op_kind(op_type: str) -> str:
    """device: a kernel. shape: arithmetic on shapes. layout: Reshape and the like, which move no bytes. data: inputs,
    constants and the output."""
    return _KINDS.get(op_type, "device")


def count_kinds(op_types: Iterable[str]) -> dict[str, int]:
    """How many operators: total, and by `op_kind`."""
    kinds = Counter(map(op_kind, op_types))
    return {"total": kinds.total(), **{kind: kinds[kind] for kind in ("device", "shape", "layout", "data")}}


def _writes_input(op: Op | None, by_name: dict[str, Op]) -> bool:
    """Whether an in-place operator writes into an input of the graph, so that the caller sees it."""
    while op is not None and (op.type in WRITES or op.type in VIEWS):
        op = by_name.get(op.first or "")
    return op is not None and op.type in INPUTS


def live_ops(ops: Iterable[Op]) -> set[str]:
    """Names of the operators that reach NetOutput or write into an input; inputs always: they are the signature."""
    by_name = {op.name: op for op in ops}
    live: set[str] = set()
    open_names: list[str] = [
        op.name
        for op in by_name.values()
        if op.type in (*INPUTS, OUTPUT) or (op.type in WRITES and _writes_input(op, by_name))
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
    while op is not None and op_kind(op.type) == "layout":
        op = by_name.get(op.first or "")
    return op.name if op is not None and op.type in INPUTS else None


def device_ops_per_layer(ops_in_order: Iterable[Op]) -> int | None:
    """Device operators from one layer's attention up to the next one's: a layer's worth, wherever layers begin.

    None with fewer than two layers, or if they differ.
    """
    spans: set[int] = set()
    count: int | None = None
    for op in ops_in_order:
        if op.type in ATTENTIONS:
            if count is not None:
                spans.add(count)
            count = 0
        if count is not None and op_kind(op.type) == "device":
            count += 1
    return spans.pop() if len(spans) == 1 else None
