"""Faults that were seen on real devices, put into the emulated one: operators, or a graph, that misbehave."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_tc.artifacts.ge.graph import Node
from qwen2vl_tc.artifacts.soc import DEFAULT_SOC
from qwen2vl_tc.runtime.ops import OPERATORS, computed
from qwen2vl_tc.runtime.ops.kernel import Kernel, Outputs

from .emulated_npu import EmulatedGraph, host_view

# (the operator as it should be, its node, its inputs) to what comes out instead
Fault = Callable[..., Outputs]
ATTENTION = ("FusedInferAttentionScore", "PromptFlashAttention", "IncreFlashAttention")
ROTATIONS = ("RotaryMul", "RotaryPositionEmbedding")
WRITES = ("Scatter",)
_LENGTHS, _LENGTHS_KV = 5, 6


def uniform_average(right: Kernel, node: Node, q: Tensor, *rest: Any) -> Outputs:
    # without a query, every key scores the same
    return right(node, torch.zeros_like(q), *rest)


def one_row_uniform(right: Kernel, node: Node, q: Tensor, *rest: Any) -> Outputs:
    out = right(node, q, *rest)[0].clone()
    if len(q) > 1:
        out[1] = uniform_average(right, node, q, *rest)[0][1]
    return out, torch.zeros(1)


def columns_unturned(right: Kernel, node: Node, x: Tensor, *rest: Any) -> Outputs:
    out = right(node, x, *rest)[0].clone()
    kept = x.shape[-1] // 5  # 16 of 80
    out[..., -kept:] = x[..., -kept:]
    return (out,)


def unwritten(right: Kernel, node: Node, *inputs: Any) -> Outputs:
    return tuple(torch.zeros_like(out) for out in right(node, *inputs))


def not_numbers(right: Kernel, node: Node, *inputs: Any) -> Outputs:
    return tuple(torch.full_like(out, float("nan")) for out in right(node, *inputs))


def mask_ignored(right: Kernel, node: Node, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Outputs:
    """Keys from position 512 on are seen by every query, where the mask says otherwise."""
    out, *others = right(node, q, k, v, *rest)
    length, tokens = int(rest[_LENGTHS_KV - 3][0]), q.shape[1]
    heads, groups = node.attributes["num_heads"], node.attributes["num_key_value_heads"]
    keys, values = (x[0, :length].float().unflatten(-1, (groups, -1)).transpose(0, 1)[None] for x in (k, v))
    key, query = torch.arange(length)[None], torch.arange(length - tokens, length)[:, None]
    seen = F.scaled_dot_product_attention(
        q[0].float().unflatten(-1, (heads, -1)).transpose(0, 1)[None],
        keys,
        values,
        attn_mask=(key <= query) | (key >= 512),
        scale=node.attributes["scale"],
        enable_gqa=True,
    )
    return (seen[0].transpose(0, 1).reshape(out.shape).to(out.dtype), *others)


def lengths_misread(right: Kernel, node: Node, *inputs: Any) -> Outputs:
    """Cumulative lengths (TND) taken as plain ones, plain ones (BSH) as cumulative."""
    given: list[Any] = list(inputs)
    packed = node.attributes["input_layout"] == "TND"
    empty = torch.zeros(0, dtype=torch.bool)
    for place in (_LENGTHS, _LENGTHS_KV):
        if place < len(given) and given[place] is not None:
            lengths = given[place]
            if packed:
                read = lengths.cumsum(0).clamp(max=int(lengths[-1]))
            else:
                read = torch.diff(lengths, prepend=torch.zeros(1, dtype=lengths.dtype))
                empty, read = read <= 0, read.clamp(min=1)
            given[place] = read
    out, *others = right(node, *given)
    if len(empty):
        out[empty] = 0
    return (out, *others)


def written_one_off(right: Kernel, node: Node, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    return right(node, var, indices + 1, updates)


def heads_swapped(right: Kernel, node: Node, *inputs: Any) -> Outputs:
    out, *others = right(node, *inputs)
    count = node.attributes["num_heads"]
    heads = out if node.attributes["input_layout"] == "TND" else out.unflatten(-1, (count, -1))
    order = torch.tensor([1, 0, *range(2, count)])
    return (heads.index_select(-2, order).reshape(out.shape), *others)


def fresh(tensor: Tensor) -> Tensor:
    """The tensor's memory as nothing has written to it."""
    host_view(tensor).zero_()
    return tensor


class Faulty:
    """Operators and graphs that misbehave while a fault is set; made before the graphs are loaded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._graph = ""
        self._fault: tuple[str, tuple[str, ...], Fault] | None = None
        self._stale: str | None = None
        self._first: dict[str, list[Tensor]] = {}
        for name in computed():
            faulty = self._kernel(name, OPERATORS[name].kernel(DEFAULT_SOC))
            patch.setitem(OPERATORS.changed, name, replace(OPERATORS[name], run=faulty, run_on={}))
        run = EmulatedGraph.run

        def recorded(graph: EmulatedGraph, *arguments: Any, **options: Any) -> list[Tensor]:
            self._graph = graph.options["ge.graph_key"]
            outputs = run(graph, *arguments, **options)
            if self._graph != self._stale:
                return outputs
            first = self._first.setdefault(self._graph, outputs)
            # memory of another size is fresh
            pairs = zip(first, outputs, strict=True)
            return [old if old.shape == new.shape else fresh(new) for old, new in pairs]

        patch.setattr(EmulatedGraph, "run", recorded)

    def _kernel(self, name: str, right: Kernel) -> Kernel:
        def kernel(node: Node, *inputs: Any) -> Outputs:
            if self._fault is None or self._fault[0] != self._graph or name not in self._fault[1]:
                return right(node, *inputs)
            return self._fault[2](right, node, *inputs)

        return kernel

    def set(self, graph: str, operators: tuple[str, ...], fault: Fault) -> None:
        """From now on, these operators of this graph do that."""
        self._fault = (graph, operators, fault)

    def leave_outputs(self, graph: str) -> None:
        """From now on, this graph writes its outputs once and never again."""
        self._stale = graph

    def repair(self) -> None:
        self._fault, self._stale = None, None
        self._first.clear()
