"""Rotary angles, computed from positions: no table limits the length."""

import numpy as np

from .graph import Graph
from .source import Floats


def frequencies(dim: int, theta: float) -> Floats:
    """[dim / 2], in the fp32 arithmetic of transformers' rotary embeddings."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(np.float32(theta), exponents)


def rotary_tables(graph: Graph, positions: str, axes: Floats, shape: tuple[str, str]) -> tuple[str, str]:
    """cos and sin [*shape, D / 2] of positions [axes, *shape]; axes [axes, D / 2]: a frequency for one axis, else 0."""
    column = graph.constant("rope.column", [-1], np.int64)
    as_float = graph.cast("rope.positions", positions, "fp32")
    as_column = graph.node("Unsqueeze", "rope.by_position", as_float, column)
    frequency = graph.constant("rope.frequencies", axes[:, None, None])
    turned = graph.node("Mul", "rope.by_axis", as_column, frequency)
    angles = graph.node("ReduceSum", "rope.angles", turned, graph.constant("rope.axis", [0], np.int64), keepdims=0)
    return graph.node("Cos", "rope.cos", angles), graph.node("Sin", "rope.sin", angles)
