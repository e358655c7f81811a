"""The dtypes of a traced graph's tensors, from its inputs onwards: descriptors inside it say little."""

from collections.abc import Callable
from typing import Any

from ...artifacts.errors import TargetError
from ...artifacts.ge.ops import CONSTANT, CONTROL, INPUTS

# ge.proto.DataType, as descriptors number them
FLOAT, INT32, INT64, BOOL = 1, 7, 8, 11
# ge::DataType, as attributes number them, to the same
FROM_ATTRIBUTE = {0: 1, 1: 2, 2: 3, 3: 7, 4: 4, 9: 8, 12: 11, 27: 27}

Dtypes = list[int]
# what an operator of each type gives, from the dtypes of its inputs (0 where one is not fed)
_Rule = Callable[[Any, Dtypes], Dtypes]


def _like_first(op: Any, inputs: Dtypes) -> Dtypes:
    return [inputs[0]] * len(op.output_desc)


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        (
            "Add",
            "Addcmul",
            "FastGelu",
            "Gather",
            "GatherV2",
            "Gelu",
            "GeluV2",
            "Identity",
            "IncreFlashAttention",
            "MatMul",
            "Mul",
            "Pack",
            "PromptFlashAttention",
            "ReduceAll",
            "ReduceSum",
            "Reshape",
            "RotaryMul",
            "RotaryPositionEmbedding",
            "Scatter",
            "ScatterNdUpdate",
            "SplitV",
            "Squeeze",
            "SwiGlu",
            "TensorMove",
            "Transpose",
            "Unsqueeze",
        ),
        _like_first,
    ),
    # statistics are fp32 whatever is normalised
    "RmsNorm": lambda op, inputs: [inputs[0], FLOAT],
    "AddRmsNorm": lambda op, inputs: [inputs[0], FLOAT, inputs[0]],
    "LayerNormV4": lambda op, inputs: [inputs[0], FLOAT, FLOAT],
    "AddLayerNorm": lambda op, inputs: [inputs[0], FLOAT, FLOAT, inputs[0]],
    "FusedInferAttentionScore": lambda op, inputs: [inputs[0], FLOAT],
    "SelectV2": lambda op, inputs: [inputs[1]],
    "IsFinite": lambda op, inputs: [BOOL],
    "Shape": lambda op, inputs: [FROM_ATTRIBUTE[op.attr["dtype"].i]],
    "Cast": lambda op, inputs: [FROM_ATTRIBUTE[op.attr["dst_type"].i]],
    "ArgMaxV2": lambda op, inputs: [FROM_ATTRIBUTE[op.attr["dtype"].dt]],
    "FileConstant": lambda op, inputs: [FROM_ATTRIBUTE[op.attr["dtype"].dt]],
    "NetOutput": lambda op, inputs: [],
}


def tensor_dtypes(graph: Any) -> dict[str, Dtypes]:
    """ge.proto.DataType of every operator's outputs, by its name; all but inputs and constants are in an order that can
    be run.

    Raises TargetError for an operator whose dtypes no rule gives.
    """
    found = {op.name: [op.output_desc[0].dtype] for op in graph.op if op.type in (*INPUTS, CONSTANT)}
    for op in graph.op:
        if op.name in found:
            continue
        if op.type not in _RULES:
            raise TargetError(f"{op.type} {op.name}: no rule says which dtypes it gives")
        found[op.name] = _RULES[op.type](op, input_dtypes(op, found))
    return found


def input_dtypes(op: Any, found: dict[str, Dtypes]) -> Dtypes:
    """The dtypes that reach an operator's data inputs; 0 where one is not fed."""
    edges = (op.input[i].rpartition(":") for i in data_inputs(op))
    return [found[name][int(index)] if index else 0 for name, _, index in edges]


def data_inputs(op: Any) -> list[int]:
    """Which of an operator's edges carry data: torchair puts control edges, which only order, before them."""
    return [i for i, edge in enumerate(op.input) if edge.rpartition(":")[2] != CONTROL]
