"""CPU operators against their documented formulas, written out here in float64 with numpy."""

from math import erf
from typing import Any

import numpy as np
import pytest
import torch
from helpers.kernels import FP32, assert_close, assert_rounded, normal, rounded, run, share_beside, ulp, wide

from qwen2vl_tc.artifacts.errors import ArtifactError

HALVES = [torch.bfloat16, torch.float16]


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


def assert_sum_rounded(got: torch.Tensor, exact: np.ndarray) -> None:
    """As assert_rounded, for a sum of products: where they cancel, what is left of fp32 is coarser than the dtype."""
    expected = rounded(exact, got.dtype)
    assert (np.abs(wide(got) - expected) <= ulp(expected, got.dtype) + FP32).all()
    assert share_beside(got, expected) < 0.02


def half_rotated(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    rotated = np.concatenate([-x[..., half:], x[..., :half]], -1)
    result: np.ndarray = x * cos + rotated * sin
    return result


@pytest.mark.parametrize("op", ["RotaryMul", "RotaryPositionEmbedding"])
@pytest.mark.parametrize("dim", [2, 80, 128])
@pytest.mark.parametrize("table", [(2, 3, 4), (2, 3, 1), (1, 3, 1), (1, 3, 4)])
def test_rotation_turns_the_halves_and_rounds_once(op: str, dim: int, table: tuple[int, ...]) -> None:
    x, cos, sin = normal(2, 3, 4, dim), normal(*table, dim, seed=1), normal(*table, dim, seed=2)
    assert_close(run(op, x, cos, sin)[0], half_rotated(wide(x), wide(cos), wide(sin)))
    for dtype in HALVES:
        given = [tensor.to(dtype) for tensor in (x, cos, sin)]
        exact = half_rotated(*(wide(tensor) for tensor in given))
        got = run(op, *given)[0]
        # where the two products cancel, what is left of fp32 is coarser than the dtype
        assert np.isclose(
            wide(got), rounded(exact, dtype), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=FP32
        ).all()
        assert (wide(got) == rounded(exact, dtype)).mean() > 0.98


def test_rotary_position_embedding_is_rotary_mul_bit_for_bit() -> None:
    x, cos, sin = (
        normal(*shape, seed=seed).bfloat16() for seed, shape in enumerate([(2, 9, 4, 80), *[(2, 9, 1, 80)] * 2])
    )
    assert torch.equal(run("RotaryPositionEmbedding", x, cos, sin, mode=0)[0], run("RotaryMul", x, cos, sin)[0])


@pytest.mark.parametrize(
    ("op", "shapes", "given", "message"),
    [
        ("RotaryMul", ((1, 3, 2, 8), (1, 3, 1, 8)), {"rotary_mode": "interleave"}, "rotary_mode interleave"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (1, 3, 1, 8)), {"mode": 1}, "mode 1 is not supported, only 0"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (1, 1, 1, 8)), {}, r"tables \[1, 1, 1, 8\] for 3 positions"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (1, 2, 1, 8)), {}, r"tables \[1, 2, 1, 8\] .* do not fit x"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (1, 3, 1, 4)), {}, "do not fit x"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (1, 3, 1, 1)), {}, "do not fit x"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 8), (3, 8)), {}, "do not fit x"),
        ("RotaryPositionEmbedding", ((3, 2, 8), (3, 1, 8)), {}, "expected 4 dimensions"),
        ("RotaryPositionEmbedding", ((1, 3, 2, 7), (1, 3, 1, 7)), {}, "the last of them even"),
        ("RotaryMul", ((1, 3, 2, 1), (1, 3, 1, 1)), {}, "the last of them even"),
    ],
)
def test_rotations_that_do_not_fit_are_refused(op: str, shapes: Any, given: dict[str, Any], message: str) -> None:
    x, table = (normal(*shape) for shape in shapes)
    with pytest.raises(ArtifactError, match=f"{op} under_test: .*{message}"):
        run(op, x, table, table, **given)


def test_tables_of_another_dtype_and_fed_options_are_refused() -> None:
    x, table = normal(1, 3, 2, 8).bfloat16(), normal(1, 3, 1, 8)
    with pytest.raises(ArtifactError, match="bfloat16, float32, float32, expected one dtype"):
        run("RotaryPositionEmbedding", x, table, table)
    with pytest.raises(ArtifactError, match="an input is fed that is not supported"):
        run("RotaryPositionEmbedding", table, table, table, table)
    with pytest.raises(ArtifactError, match="an input is fed that is not supported"):
        run("MatMul", normal(2, 3), normal(3, 2), None, normal(1))
    assert run("RotaryPositionEmbedding", table, table, table, None)[0].shape == table.shape


def swi_glu(x: np.ndarray) -> np.ndarray:
    a, b = np.split(x, 2, -1)
    result: np.ndarray = a / (1 + np.exp(-a)) * b
    return result


def fast_gelu(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x / (1 + np.exp(-1.702 * np.abs(x))) * np.exp(0.851 * (x - np.abs(x)))
    return result


def gelu(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))
    return result


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    return result


@pytest.mark.parametrize(
    ("op", "given", "formula"),
    [
        ("SwiGlu", {}, swi_glu),
        ("SwiGlu", {"dim": 1}, swi_glu),
        ("FastGelu", {}, fast_gelu),
        ("GeluV2", {}, gelu),
        ("GeluV2", {"approximate": "none"}, gelu),
        ("GeluV2", {"approximate": "tanh"}, gelu_tanh),
    ],
)
def test_activations(op: str, given: dict[str, Any], formula: Any) -> None:
    x = normal(64, 48) * 3
    assert_close(run(op, x, **given)[0], formula(wide(x)), 1e-5)
    for dtype in HALVES:
        # gelu's tail is what fp32 leaves of 1 + erf: far below the values that are rounded
        half = x.clamp(min=-2).to(dtype)
        assert_rounded(run(op, half, **given)[0], rounded(formula(wide(half)), dtype))


@pytest.mark.parametrize("count", [1, 13, 64, 1000])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_gelu_of_what_overflows_is_itself(count: int, approximate: str, dtype: torch.dtype) -> None:
    for value in (float("inf"), 3.3e38, 1e20, 6e4, 40.0):
        x = torch.full((count,), value).to(dtype)
        assert torch.equal(run("GeluV2", x, approximate=approximate)[0], x)
    assert not run("GeluV2", torch.full((count,), -3.3e38), approximate=approximate)[0].any()
    assert run("GeluV2", torch.full((count,), float("nan")), approximate=approximate)[0].isnan().all()


def test_halves_that_are_none_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"axis 1 of \[2, 3\] has no two halves"):
        run("SwiGlu", normal(2, 3))
    with pytest.raises(ArtifactError, match="axis 2 of a tensor of 2 dimensions"):
        run("SwiGlu", normal(2, 4), dim=2)


@pytest.mark.parametrize("dtype", HALVES)
def test_addcmul_rounds_once(dtype: torch.dtype) -> None:
    a, b, c = normal(64, 32, dtype=dtype), normal(1, 32, seed=1, dtype=dtype), normal(64, 1, seed=2, dtype=dtype)
    value = torch.tensor([0.75], dtype=dtype)
    (got,) = run("Addcmul", a, b, c, value)
    exact = wide(a) + 0.75 * wide(b) * wide(c)
    assert np.isclose(
        wide(got), rounded(exact, dtype), rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=FP32
    ).all()
    assert (wide(got) == rounded(exact, dtype)).mean() > 0.98
    counts = run("Addcmul", *(torch.tensor([n]) for n in (1 << 40, 3, 5)), torch.tensor(2))[0]
    assert counts.tolist() == [(1 << 40) + 30]
    with pytest.raises(ArtifactError, match=r"value has the shape \[2\]"):
        run("Addcmul", a, b, c, value.expand(2))


def test_a_shape_is_read_taken_apart_and_packed() -> None:
    (sizes,) = run("Shape", torch.zeros(3, 5, 7), dtype=9)
    assert (sizes.dtype, sizes.tolist()) == (torch.int64, [3, 5, 7])
    assert run("Shape", torch.zeros(3))[0].dtype == torch.int32
    (first,), (last,) = run("Gather", sizes, torch.tensor(0)), run("Gather", sizes, torch.tensor([2]))
    assert (first.shape, first.tolist(), last.tolist()) == ((), 3, [7])
    assert run("Pack", first, torch.tensor(-1), axis=0)[0].tolist() == [3, -1]
    with pytest.raises(ArtifactError, match=r"reads \[3\] of \[3\]"):
        run("Gather", sizes, torch.tensor(3))


def test_is_finite_and_what_selects_by_it() -> None:
    x = torch.tensor([[1.0, float("nan"), 2.0], [float("inf"), -float("inf"), 3.0]])
    (finite,) = run("IsFinite", x)
    assert (finite.dtype, finite.tolist()) == (torch.bool, [[True, False, True], [False, False, True]])
    assert run("IsFinite", torch.tensor([7e4, 6e4]).half())[0].tolist() == [False, True]
    assert run("SelectV2", finite, x, torch.zeros(2, 3))[0].tolist() == [[1, 0, 2], [0, 0, 3]]
    assert run("SelectV2", torch.tensor(False), torch.tensor([1, 2]), torch.tensor([-1]))[0].tolist() == [-1, -1]
    rows = torch.tensor([True, False, True])
    assert run("SelectV2", rows, torch.ones(2, 3), torch.tensor(0.0))[0].tolist() == [[1, 0, 1]] * 2
    with pytest.raises(ArtifactError, match="the condition is int64, expected bool"):
        run("SelectV2", rows.long(), x, x)


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_arithmetic_broadcasts_and_takes_one_dtype(op: str) -> None:
    x, y = normal(4, 1), normal(3, seed=1)
    assert_close(run(op, x, y)[0], wide(x) + wide(y) if op == "Add" else wide(x) * wide(y))
    with pytest.raises(ArtifactError, match="float32, bfloat16, expected one dtype"):
        run(op, x, y.bfloat16())


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((normal(2, 3), normal(3, 2), normal(1)), r"bias \[1\] for 2 columns"),
        ((normal(2, 2, 3), normal(3, 2)), r"multiplies \[2, 2, 3\] by \[3, 2\], expected two matrices"),
        ((normal(2, 3), normal(3, 2).half()), "expected one dtype"),
        ((torch.ones(2, 3).int(), torch.ones(3, 2).int()), "got int32"),
        ((normal(2, 3), normal(2, 3)), r"cannot run on \(\[2, 3\] float32, \[2, 3\] float32\)"),
    ],
)
def test_products_that_do_not_fit_are_refused(inputs: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"MatMul under_test: .*{message}"):
        run("MatMul", *inputs)
