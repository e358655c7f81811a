"""CPU operators against their documented formulas, written out here in float64 with numpy."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.runtime.backends.ge.attention import fused_infer_attention_score
from qwen2vl_tc.runtime.backends.ge.operators import OPERATORS

# one fp32 rounding each of a few operations on values of order 1
FP32 = 2e-6


def node(**attributes: Any) -> Any:
    return SimpleNamespace(attributes=attributes, where="Op under_test", op="Op", name="under_test")


def run(operator: str, *inputs: Any, **attributes: Any) -> tuple[torch.Tensor, ...]:
    return OPERATORS[operator](node(**attributes), *inputs)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def wide(tensor: torch.Tensor) -> np.ndarray:
    result: np.ndarray = tensor.double().numpy()
    return result


def assert_close(got: torch.Tensor, expected: np.ndarray, tolerance: float = FP32) -> None:
    assert np.abs(wide(got) - expected).max() < tolerance


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    result: np.ndarray = powers / powers.sum(-1, keepdims=True)
    return result


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, offset: int | None) -> np.ndarray:
    """q [tokens, heads, dim], k and v [length, kv_heads, dim]; query i sees keys up to i + offset, or all."""
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, kv].T * scale
        if offset is not None:
            hidden = np.arange(k.shape[0])[None] > np.arange(q.shape[0])[:, None] + offset
            scores = np.where(hidden, -np.inf, scores)
        out[:, head] = softmax(scores) @ v[:, kv]
    return out


def test_mat_mul_transposes_by_attribute_and_adds_the_bias() -> None:
    x, w, bias = normal(3, 5), normal(7, 5, seed=1), normal(7, seed=2)
    (got,) = run("MatMul", x, w, bias, None, transpose_x1=False, transpose_x2=True)
    assert_close(got, wide(x) @ wide(w).T + wide(bias))
    (got,) = run("MatMul", x.t(), w.t(), None, transpose_x1=True, transpose_x2=False)
    assert_close(got, wide(x) @ wide(w).T)


@pytest.mark.parametrize("rows", [1, 9])
def test_half_precision_products_are_accumulated_wide_and_rounded_once(rows: int) -> None:
    x, w = normal(rows, 4096).bfloat16(), normal(16, 4096, seed=1).bfloat16()
    (got,) = run("MatMul", x, w, None, transpose_x2=True)
    exact = wide(x) @ wide(w).T
    assert got.dtype == torch.bfloat16
    # half a unit in the last place of bf16 is 2^-9 of the value
    assert (np.abs(wide(got) - exact) <= np.abs(exact) * 2**-8 + 1e-3).all()


def test_an_fp32_bias_keeps_its_precision_beside_half_precision_weights() -> None:
    x, w, bias = torch.zeros(1, 8).bfloat16(), torch.zeros(4, 8).bfloat16(), torch.full((4,), 1.00390625)
    (got,) = run("MatMul", x, w, bias, transpose_x2=True)
    assert got.dtype == torch.bfloat16
    assert_close(got, np.full((1, 4), 1.0), 0.01)


def test_rms_norm_and_its_fused_addition() -> None:
    x1, x2, gamma = normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)
    y, rstd, total = run("AddRmsNorm", x1, x2, gamma, epsilon=1e-6)
    exact = wide(x1) + wide(x2)
    scale = 1 / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert_close(total, exact)
    assert_close(rstd, scale)
    assert_close(y, exact * scale * wide(gamma))
    assert_close(
        run("RmsNorm", x1, gamma, epsilon=1e-6)[0],
        wide(x1) / np.sqrt((wide(x1) ** 2).mean(-1, keepdims=True) + 1e-6) * wide(gamma),
    )


def test_layer_norm() -> None:
    x, gamma, beta = normal(3, 8), normal(8, seed=1), normal(8, seed=2)
    y, mean, rstd = run("LayerNormV4", x, torch.tensor([8]), gamma, beta, epsilon=1e-6)
    exact = wide(x)
    expected_mean = exact.mean(-1, keepdims=True)
    expected_rstd = 1 / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    assert_close(mean, expected_mean)
    assert_close(rstd, expected_rstd)
    assert_close(y, (exact - expected_mean) * expected_rstd * wide(gamma) + wide(beta))


def test_rotary_mul_rotates_the_halves() -> None:
    x, cos, sin = normal(1, 3, 2, 8), normal(1, 3, 1, 8, seed=1), normal(1, 3, 1, 8, seed=2)
    exact = wide(x)
    rotated = np.concatenate([-exact[..., 4:], exact[..., :4]], -1)
    assert_close(run("RotaryMul", x, cos, sin)[0], exact * wide(cos) + rotated * wide(sin))


def test_activations() -> None:
    from math import erf

    x = normal(4, 6) * 3
    exact = wide(x)
    a, b = exact[:, :3], exact[:, 3:]
    assert_close(run("SwiGlu", x, dim=-1)[0], a / (1 + np.exp(-a)) * b, 1e-5)
    absolute = np.abs(exact)
    assert_close(run("FastGelu", x)[0], exact / (1 + np.exp(-1.702 * absolute)) * np.exp(0.851 * (exact - absolute)))
    assert_close(run("GeluV2", x)[0], exact * 0.5 * (1 + np.vectorize(erf)(exact / np.sqrt(2))))
    tanh = 0.5 * exact * (1 + np.tanh(np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)))
    assert_close(run("GeluV2", x, approximate="tanh")[0], tanh)


def test_scatter_writes_each_row_at_its_own_index_in_place() -> None:
    var = torch.zeros(2, 5, 3)
    updates = normal(2, 1, 3)
    (got,) = run("Scatter", var, torch.tensor([4, 1]), updates, axis=1, reduce="update")
    assert got is var
    assert torch.equal(var[0, 4], updates[0, 0])
    assert torch.equal(var[1, 1], updates[1, 0])
    assert var.count_nonzero() == 6


def test_scatter_outside_the_cache_is_refused() -> None:
    with pytest.raises(ArtifactError, match="writes 5 to 6 of axis 1, which has 5"):
        run("Scatter", torch.zeros(1, 5, 3), torch.tensor([5]), torch.zeros(1, 1, 3), axis=1, reduce="update")
    with pytest.raises(ArtifactError, match="reduce=update"):
        run("Scatter", torch.zeros(1, 5, 3), torch.tensor([5]), torch.zeros(1, 1, 3), axis=1, reduce="add")


def test_indexing_and_shape_operators() -> None:
    x = normal(4, 3)
    assert torch.equal(run("GatherV2", x, torch.tensor([[2, 0]]), torch.tensor([0]))[0], x[[2, 0]][None])
    assert torch.equal(run("GatherV2", x, torch.tensor([1]), torch.tensor([1]))[0], x[:, 1:2])
    moved = run("TensorMove", x)[0]
    updated = run("ScatterNdUpdate", moved, torch.tensor([[3], [1]]), normal(2, 3, seed=1))[0]
    assert torch.equal(updated[[3, 1]], normal(2, 3, seed=1))
    assert torch.equal(x, normal(4, 3)), "TensorMove protects what it copies"
    assert [part.shape for part in run("SplitV", x, torch.tensor([1, 3]), torch.tensor(0))] == [(1, 3), (3, 3)]
    assert run("Reshape", x, torch.tensor([0, -1, 1]), axis=0, num_axes=-1)[0].shape == (4, 3, 1)
    assert_close(run("ReduceSum", x, torch.tensor([0]), keep_dims=False)[0], wide(x).sum(0))
    assert run("Cast", x, dst_type=27)[0].dtype == torch.bfloat16
    assert torch.equal(run("Add", x, x)[0], run("Mul", x, torch.tensor(2.0))[0])


def test_arg_max_takes_the_first_of_equal_values() -> None:
    (got,) = run("ArgMaxV2", torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([-1]), dtype=9)
    assert (got.tolist(), got.dtype) == ([1], torch.int64)


def fia(q: Any, k: Any, v: Any, mask: Any = None, ends: Any = None, ends_kv: Any = None, **given: Any) -> torch.Tensor:
    inputs = [q, k, v, None, mask, ends, ends_kv, *([None] * 20)]
    return fused_infer_attention_score(node(**{"sparse_mode": 0, "scale": 0.3, **given}), *inputs)[0]


def test_attention_over_a_cache_reads_only_what_each_row_has() -> None:
    q, k, v = normal(2, 1, 4 * 8), normal(2, 6, 2 * 8, seed=1), normal(2, 6, 2 * 8, seed=2)
    got = fia(q, k, v, ends_kv=torch.tensor([3, 6]), input_layout="BSH", num_heads=4, num_key_value_heads=2)
    for row, length in enumerate([3, 6]):
        heads = [wide(x[row]).reshape(-1, n, 8) for x, n in ((q, 4), (k, 2), (v, 2))]
        exact = attention(heads[0], heads[1][:length], heads[2][:length], 0.3, None)
        assert_close(got[row], exact.reshape(1, -1))


@pytest.mark.parametrize(("tokens", "length"), [(5, 5), (3, 9), (600, 700)])
def test_right_down_causal_attention_aligns_with_the_end_of_the_cache(tokens: int, length: int) -> None:
    q, k, v = normal(1, tokens, 2 * 8), normal(1, length + 3, 8, seed=1), normal(1, length + 3, 8, seed=2)
    mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    got = fia(
        q, k, v, mask, None, torch.tensor([length]), input_layout="BSH", num_heads=2, num_key_value_heads=1,
        sparse_mode=3,
    )  # fmt: skip
    parts = wide(q[0]).reshape(tokens, 2, 8), *(wide(x[0, :length]).reshape(length, 1, 8) for x in (k, v))
    assert_close(got[0], attention(*parts, 0.3, length - tokens).reshape(tokens, -1))


def test_packed_sequences_attend_within_themselves() -> None:
    q, k, v = normal(9, 2, 8), normal(9, 2, 8, seed=1), normal(9, 2, 8, seed=2)
    ends = torch.tensor([4, 4, 9])
    got = fia(q, k, v, None, ends, ends, input_layout="TND", num_heads=2, num_key_value_heads=0)
    for start, end in ((0, 4), (4, 9)):
        assert_close(got[start:end], attention(*(wide(x[start:end]) for x in (q, k, v)), 0.3, None))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ends": torch.tensor([4]), "ends_kv": torch.tensor([4])}, "do not partition 9 tokens"),
        ({"ends": torch.tensor([10]), "ends_kv": torch.tensor([10])}, "outside 0 to 9"),
        ({"ends": torch.tensor([5, 4, 9]), "ends_kv": torch.tensor([5, 4, 9])}, "do not partition"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    x = normal(9, 2, 8)
    with pytest.raises(ArtifactError, match=message):
        fia(x, x, x, None, *arguments.values(), input_layout="TND", num_heads=2, num_key_value_heads=0)


def test_unsupported_attention_is_refused_by_name() -> None:
    x = normal(1, 9, 16)
    with pytest.raises(ArtifactError, match="sparse_mode 4"):
        fia(x, x, x, input_layout="BSH", num_heads=2, num_key_value_heads=0, sparse_mode=4)
    with pytest.raises(ArtifactError, match="layout BNSD"):
        fia(x, x, x, input_layout="BNSD", num_heads=2, num_key_value_heads=0)


def test_one_query_token_with_a_causal_mask_is_refused_as_the_operator_documents() -> None:
    x, mask = normal(1, 1, 16), torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    with pytest.raises(ArtifactError, match="takes no causal mask"):
        fia(x, x, x, mask, input_layout="BSH", num_heads=2, num_key_value_heads=0, sparse_mode=3)
