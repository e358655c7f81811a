"""The dtypes of a traced graph's tensors, from its inputs onwards: descriptors inside it say little."""

from typing import Any

from ...artifacts.dtypes import BY_GE, BY_PROTO
from ...artifacts.errors import TargetError
from ...artifacts.ge.graph import attribute_value
from ...artifacts.ge.ops import CONSTANT, CONTROL, FILE_CONSTANT, INPUTS, OUTPUT
from ...runtime.ops import OPERATORS


def tensor_dtypes(graph: Any) -> dict[str, list[str]]:
    """The dtypes of every operator's outputs, by its name; all but inputs and constants are in an order that can be
    run.

    Raises TargetError for an operator whose dtypes nothing says.
    """
    dtypes: dict[str, list[str]] = {op.name: [] for op in graph.op if op.type == OUTPUT}
    dtypes |= {op.name: [dtype_name(op.output_desc[0].dtype)] for op in graph.op if op.type in (*INPUTS, CONSTANT)}
    # torchair leaves the descriptor of one empty
    dtypes |= {op.name: [BY_GE[op.attr["dtype"].dt].name] for op in graph.op if op.type == FILE_CONSTANT}
    for op in graph.op:
        if op.name in dtypes:
            continue
        if op.type not in OPERATORS:
            raise TargetError(f"{op.type} {op.name}: no rule says which dtypes it gives")
        attributes = {name: attribute_value(value) for name, value in op.attr.items()}
        dtypes[op.name] = OPERATORS[op.type].dtypes(len(op.output_desc), attributes, input_dtypes(op, dtypes))
    return dtypes


def dtype_name(number: int) -> str:
    """The artifact's name of a ge.proto.DataType. Raises TargetError for one that no graph here may hold."""
    if number not in BY_PROTO:
        raise TargetError(f"GE dtype {number} is not one that the runtime binds")
    return BY_PROTO[number].name


def input_dtypes(op: Any, dtypes: dict[str, list[str]]) -> list[str | None]:
    """The dtypes that reach an operator's data inputs; None where one is not fed."""
    edges = (op.input[i].rpartition(":") for i in data_inputs(op))
    return [dtypes[name][int(index)] if index else None for name, _, index in edges]


def data_inputs(op: Any) -> list[int]:
    """Which of an operator's edges carry data: torchair puts control edges, which only order, before them."""
    return [i for i, edge in enumerate(op.input) if edge.rpartition(":")[2] != CONTROL]
