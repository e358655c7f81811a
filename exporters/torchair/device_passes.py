"""Passes that write a graph as CANN's libraries take it, from 8.1 on; each has the rule of `check` that it obeys."""

import struct
from collections import Counter
from typing import Any

from ...artifacts.dtypes import proto_number
from ...artifacts.ge.graph import attribute_value
from ...artifacts.ge.ops import CONSTANT, INPUTS
from ...runtime.ops import known
from ...runtime.ops.base import DEVICE
from .dtypes import data_inputs, input_dtypes, tensor_dtypes

# RotaryMul's contract on Ascend 910B; beyond it columns may stay unturned, without a message
_ROTARY_MULTIPLE = 64


def _producers(graph: Any) -> dict[str, Any]:
    return {op.name: op for op in graph.op}


def _input(op: Any, number: int) -> str:
    """The edge of a data input."""
    edge: str = op.input[data_inputs(op)[number]]
    return edge


def _source(edge: str, producers: dict[str, Any]) -> Any:
    return producers[edge.rpartition(":")[0]]


def rotate_any_width(graph: Any) -> None:
    """RotaryMul over a last dimension that is no multiple of 64 becomes RotaryPositionEmbedding, mode 0: the same
    rotation of halves, for any even width below 896."""
    producers = _producers(graph)
    for op in graph.op:
        if op.type == "RotaryMul" and _last_dimension(op, producers) % _ROTARY_MULTIPLE:
            op.type = "RotaryPositionEmbedding"
            names = ("x", "cos", "sin")
            op.attr["_input_name_key"].list.s[:] = [name.encode() for name in names]
            for desc, name in zip(op.input_desc, names, strict=True):
                desc.name = name
            op.attr["mode"].i = 0


def _last_dimension(op: Any, producers: dict[str, Any]) -> int:
    """The width of what a rotary operator rotates, which a Reshape to a constant shape gives it."""
    shape = _source(_input(_source(_input(op, 0), producers), 1), producers).attr["value"].t
    return int(struct.unpack("<q", shape.data[-8:])[0])


def write_fresh_tensors(graph: Any) -> None:
    """Drop a TensorMove that copies, for an operator that writes in place, what nobody else reads."""
    producers = _producers(graph)
    readers = Counter(edge for op in graph.op for edge in op.input)
    dropped = set()
    for op in graph.op:
        if not known(op.type).writes:
            continue
        place = data_inputs(op)[0]
        copy = _source(op.input[place], producers)
        if copy.type != "TensorMove":
            continue
        copied = _input(copy, 0)
        if readers[op.input[place]] == 1 and readers[copied] == 1:
            origin = _source(copied, producers)
            # a kernel's own memory: not an input's, a constant's, or a view of either
            made = known(origin.type)
            if made.kind == DEVICE and not made.writes and not made.view:
                op.input[place] = copied
                dropped.add(copy.name)
    for i in reversed(range(len(graph.op))):
        if graph.op[i].name in dropped:
            del graph.op[i]


def normalise_over_int32(graph: Any) -> None:
    """LayerNormV4's normalized_shape as int32: the libraries list no other, and GE has no rule from int64 to it.

    Before equal constants are merged each is its node's own; one that others read, too, stays as it is.
    """
    producers = _producers(graph)
    norms = [op for op in graph.op if op.type == "LayerNormV4"]
    shapes = {_input(op, 1) for op in norms}
    readers = Counter(edge for op in graph.op for edge in op.input)
    # of which others than these norms read none
    shapes -= {edge for edge in shapes if readers[edge] != sum(_input(op, 1) == edge for op in norms)}
    for edge in shapes:
        constant = _source(edge, producers)
        value = constant.attr["value"].t
        if constant.type == CONSTANT and value.desc.dtype == proto_number("int64"):
            sizes = struct.unpack(f"<{len(value.data) // 8}q", value.data)
            value.data = struct.pack(f"<{len(sizes)}i", *sizes)
            value.desc.dtype = constant.output_desc[0].dtype = proto_number("int32")


def drop_what_is_not_asked(graph: Any) -> None:
    """Drop what a library may not know and the graph does not need: unfed optional inputs at an operator's end,
    attributes that say what their absence says, and rules of shape inference for operators that have their own."""
    for op in graph.op:
        while op.input and not op.input[-1]:
            del op.input[-1], op.input_desc[-1]
            for name in ("_input_name_key", "_input_name_value"):
                values = op.attr[name].list
                del (values.s if name == "_input_name_key" else values.i)[-1]
        for name, value in known(op.type).unwritten.items():
            if name in op.attr and attribute_value(op.attr[name]) == value:
                del op.attr[name]
        if "_inference_rule" in op.attr:
            del op.attr["_inference_rule"]


def describe_dtypes(graph: Any) -> None:
    """Write the dtype that a tensor has into every descriptor of it: torchair leaves fp32 in many."""
    dtypes = tensor_dtypes(graph)
    for op in graph.op:
        if op.type in (*INPUTS, CONSTANT):
            continue
        for desc, dtype in zip(op.output_desc, dtypes[op.name], strict=True):
            desc.dtype = proto_number(dtype)
        # an input that is not fed keeps no dtype
        for desc, fed in zip(op.input_desc, input_dtypes(op, dtypes), strict=False):
            if fed:
                desc.dtype = proto_number(fed)
