"""GE operators called by themselves, and what their documented formulas give in float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qwen2vl_tc.artifacts.soc import DEFAULT_SOC
from qwen2vl_tc.runtime.ops import OPERATORS

# one fp32 rounding each of a few operations on values of order 1
FP32 = 2e-6
# bits of the significand, the hidden one included
_PRECISION = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24}


def node(op: str = "Op", **attributes: Any) -> Any:
    return SimpleNamespace(attributes=attributes, where=f"{op} under_test", op=op, name="under_test")


def run(op: str, *inputs: Any, **attributes: Any) -> tuple[torch.Tensor, ...]:
    return run_on(DEFAULT_SOC, op, *inputs, **attributes)


def run_on(soc: str, op: str, *inputs: Any, **attributes: Any) -> tuple[torch.Tensor, ...]:
    return OPERATORS[op].kernel(soc)(node(op, **attributes), *inputs)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(dtype)


def wide(tensor: torch.Tensor) -> np.ndarray:
    result: np.ndarray = tensor.double().numpy()
    return result


def assert_close(got: torch.Tensor, expected: np.ndarray, tolerance: float = FP32) -> None:
    assert got.shape == expected.shape
    assert np.abs(wide(got) - expected).max(initial=0) < tolerance


def ulp(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The distance between neighbours of `dtype` at each value; that of the smallest fp16 with full precision below."""
    _, exponents = np.frexp(values)
    return np.ldexp(1.0, np.maximum(exponents, -13) - _PRECISION[dtype])


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """float64 rounded to the nearest value of `dtype`, ties to even: in one step, where torch takes two."""
    step = ulp(values, dtype)
    result: np.ndarray = np.rint(values / step) * step
    return result


def share_beside(got: torch.Tensor, expected: np.ndarray) -> float:
    """The share of values that are not the expected ones, which have the dtype's precision already."""
    return float((wide(got) != expected).mean())


def assert_rounded(got: torch.Tensor, expected: np.ndarray) -> None:
    """Every value is the expected one, or in 1 of 100 its neighbour.

    That is for fp32, in which the operator computes before it rounds: 16 bits more than bf16 has and 13 more than fp16,
    so that few values come to lie on the other side of a tie.
    """
    assert (np.abs(wide(got) - expected) <= ulp(expected, got.dtype)).all()
    assert share_beside(got, expected) < 0.01


def softmax(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; zeros where everything is hidden (-inf)."""
    peak = scores.max(-1, keepdims=True, initial=-np.inf)
    powers = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
    total = powers.sum(-1, keepdims=True)
    result: np.ndarray = powers / np.where(total, total, 1)
    return result


def attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, offset: int | None = None, hidden: Any = None
) -> np.ndarray:
    """q [tokens, heads, dim], k and v [length, kv_heads, dim].

    Query i sees keys up to i + offset, or all; of them none that is hidden [tokens, length].
    """
    out = np.zeros_like(q)
    never = np.zeros((q.shape[0], k.shape[0]), dtype=bool) if hidden is None else np.asarray(hidden, dtype=bool)
    if offset is not None:
        never = never | (np.arange(k.shape[0])[None] > np.arange(q.shape[0])[:, None] + offset)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        out[:, head] = softmax(np.where(never, -np.inf, q[:, head] @ k[:, kv].T * scale)) @ v[:, kv]
    return out
