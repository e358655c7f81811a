"""A GE graph as an ONNX model, operator by operator, of whatever model: what it computes, the graph alone says.

A value is translated when something asks for it: the products and attentions in the graph's order, then the outputs.
Activations are fp32 whatever the graph's dtype: Casts between floats are left out.

Rows. A graph over a cache is traced for one row; its model takes as many as it is given. Where the runtime's interface
gives an argument one more free size than the graph (token_ids [rows, tokens] for [tokens]), that argument is flattened,
and each size of the graph that counts tokens counts rows x tokens. Where the graph has its one row as a size of its
own, in front of its tokens, there the model has all rows: a Reshape to [1, -1, ...] is one to [rows, tokens, ...]. An
argument of that one row ([1], such as `last`) picks by token in every row, the same of each.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from ...artifacts.ge.binding import Binding
from ...artifacts.ge.graph import GeGraph
from ...artifacts.manifest import Tensor
from .linear import Linears
from .operators import OPERATORS
from .translation import Translation


def translate(
    graph: GeGraph,
    binding: Binding,
    linears: Linears,
    constants: Mapping[str, NDArray[Any]],
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
) -> None:
    """Emit `graph` into the model of `linears`, with the inputs and outputs that the runtime feeds and reads.

    constants: the tables that the binding names, floats in fp32. Outputs of the graph that the runtime does not read
    are left out. Raises TargetError for an operator, or a use of one, that has no translation.
    """
    Translation(graph, binding, linears, constants, inputs, outputs, OPERATORS).run()
