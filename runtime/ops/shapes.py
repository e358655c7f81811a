"""Shape rules that several operators share, and what rules are written with."""

from collections.abc import Iterable

from .base import Call, Shape, TensorSpec

# Shapes, axes and sizes are constants of a few integers; larger ones are data.
MOST_VALUES = 64


class Misfit(Exception):
    """Inputs that the operator cannot take; whoever asked adds which operator and which inputs."""


def fits(condition: bool, problem: str) -> None:
    if not condition:
        raise Misfit(problem)


def values(spec: TensorSpec) -> tuple[int, ...]:
    if spec.values is None:
        raise Misfit(f"{spec} must be a constant of at most {MOST_VALUES} integers")
    return spec.values


def broadcast(a: Shape, b: Shape) -> Shape:
    """Numpy's rule: align at the right; equal sizes, or one of them is 1."""
    rank = max(len(a), len(b))
    pairs = list(zip(*((1,) * (rank - len(shape)) + shape for shape in (a, b)), strict=True))
    fits(all(m == n or 1 in (m, n) for m, n in pairs), "the shapes do not broadcast")
    return tuple(n if m == 1 else m for m, n in pairs)


def same(node: Call, x: TensorSpec) -> tuple[Shape, ...]:
    return (x.shape,)


def elementwise(node: Call, x1: TensorSpec, x2: TensorSpec) -> tuple[Shape, ...]:
    fits(x1.dtype == x2.dtype, "the dtypes differ")
    return (broadcast(x1.shape, x2.shape),)


def in_place(node: Call, var: TensorSpec, indices: TensorSpec, updates: TensorSpec) -> tuple[Shape, ...]:
    """The output is the first input's memory."""
    fits(var.dtype == updates.dtype and len(var.shape) == len(updates.shape), "updates do not fit the variable")
    return (var.shape,)


def without(shape: Shape, axes: Iterable[int], keep: bool) -> Shape:
    """A shape whose axes were reduced; those that are kept have 1."""
    gone = {axis % len(shape) for axis in axes}
    return tuple(1 if i in gone else size for i, size in enumerate(shape) if keep or i not in gone)
