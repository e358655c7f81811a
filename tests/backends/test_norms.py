"""Normalisation on CPU against its formulas in float64, with the roundings of the device's kernels."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.kernels import assert_close, assert_rounded, normal, rounded, run, run_on, share_beside, wide

from qwen2vl_tc.artifacts.errors import ArtifactError
from qwen2vl_tc.artifacts.soc import soc_family

HALVES = [torch.bfloat16, torch.float16]
EPSILON = 1e-6


def reciprocal(x: np.ndarray, dimensions: int = 1) -> np.ndarray:
    """1 / sqrt(mean(x^2) + epsilon) over the last dimensions."""
    axes = tuple(range(-dimensions, 0))
    result: np.ndarray = 1 / np.sqrt((x**2).mean(axes, keepdims=True) + EPSILON)
    return result


def layer_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    result: np.ndarray = (x - mean) / np.sqrt(variance + EPSILON) * gamma + beta
    return result


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_rounds_once(dtype: torch.dtype) -> None:
    x, gamma = normal(64, 256, dtype=dtype) * 3, normal(256, seed=1, dtype=dtype)
    y, rstd = run("RmsNorm", x, gamma, epsilon=EPSILON)
    assert_close(rstd, reciprocal(wide(x)))
    assert_rounded(y, rounded(wide(x) * reciprocal(wide(x)) * wide(gamma), dtype))
    assert (y.dtype, rstd.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("soc", ["Ascend910B2", "Ascend910B4-1", "Ascend910_9391"])
def test_add_rms_norm_rounds_the_sum_and_what_gamma_multiplies(soc: str, dtype: torch.dtype) -> None:
    x1, x2, gamma = (
        normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(64, 256), (64, 256), (256,)])
    )
    y, rstd, total = run_on(soc, "AddRmsNorm", x1, x2, gamma, epsilon=EPSILON)
    exact = rounded(wide(x1) + wide(x2), dtype)
    assert share_beside(total, exact) == 0
    assert_close(rstd, reciprocal(exact))
    assert_rounded(y, rounded(rounded(exact * reciprocal(exact), dtype) * wide(gamma), dtype))
    # as transformers' Qwen2RMSNorm
    assert torch.equal(y, gamma * (total.float() * rstd).to(dtype))
    assert share_beside(y, rounded(exact * reciprocal(exact) * wide(gamma), dtype)) > 0.1, "one rounding is another"


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("soc", ["Ascend950PR_9589", "Ascend950DT_9591", "Ascend910_9589"])
def test_add_rms_norm_of_ascend950_rounds_its_outputs_only(soc: str, dtype: torch.dtype) -> None:
    x1, x2, gamma = (
        normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(64, 256), (64, 256), (256,)])
    )
    y, rstd, total = run_on(soc, "AddRmsNorm", x1, x2, gamma, epsilon=EPSILON)
    exact = wide(x1) + wide(x2)
    assert share_beside(total, rounded(exact, dtype)) == 0
    assert_close(rstd, reciprocal(exact))
    assert_rounded(y, rounded(exact * reciprocal(exact) * wide(gamma), dtype))
    assert not torch.equal(y, run_on("Ascend910B2", "AddRmsNorm", x1, x2, gamma, epsilon=EPSILON)[0])


def test_in_fp32_all_socs_agree() -> None:
    x1, x2, gamma = normal(3, 8), normal(3, 8, seed=1), normal(8, seed=2)
    exact = wide(x1) + wide(x2)
    for soc in ("Ascend910B2", "Ascend950PR_9589"):
        y, rstd, total = run_on(soc, "AddRmsNorm", x1, x2, gamma, epsilon=EPSILON)
        assert_close(total, exact)
        assert_close(rstd, reciprocal(exact))
        assert_close(y, exact * reciprocal(exact) * wide(gamma))


@pytest.mark.parametrize("op", ["RmsNorm", "AddRmsNorm"])
@pytest.mark.parametrize("soc", ["Ascend910B2", "Ascend950PR_9589"])
def test_root_mean_squares_are_taken_over_all_dimensions_of_gamma(op: str, soc: str) -> None:
    x, gamma = normal(2, 3, 4), normal(3, 4, seed=1)
    addends = (x / 2, x / 2) if op == "AddRmsNorm" else (x,)
    y, rstd, *_ = run_on(soc, op, *addends, gamma, epsilon=EPSILON)
    assert_close(rstd, reciprocal(wide(x), 2))
    assert rstd.shape == (2, 1, 1)
    assert_close(y, wide(x) * reciprocal(wide(x), 2) * wide(gamma))


def test_add_layer_norm_normalises_the_sum_before_it_is_rounded() -> None:
    """In bf16 the sums 100.25 and 100.5 round to one value, and so do 100.75 and 101."""
    x1 = torch.tensor([50, 50.25, 50.5, 50.75]).bfloat16()
    x2 = torch.full((4,), 50.25).bfloat16()
    y, mean, rstd, total = run(
        "AddLayerNorm", x1, x2, torch.ones(4).bfloat16(), torch.zeros(4).bfloat16(), epsilon=1e-6
    )
    # bf16 of -1.3416, -0.4472, 0.4472, 1.3416
    assert y.tolist() == [-1.34375, -0.447265625, 0.447265625, 1.34375]
    assert mean.item() == 100.625
    assert rstd.item() == pytest.approx(1 / np.sqrt(0.078125 + EPSILON), rel=1e-6)
    assert total.tolist() == [100, 100.5, 101, 101]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_add_layer_norm_rounds_its_outputs_only(dtype: torch.dtype, biased: bool) -> None:
    # a residual stream as the tower has it: channels far from zero, and a small update
    channels = normal(256, seed=4) * 20
    x1, x2 = (normal(64, 256) * 3 + channels).to(dtype), (normal(64, 256, seed=1) * 0.3).to(dtype)
    gamma, beta, bias = (normal(256, seed=seed, dtype=dtype) for seed in (2, 3, 5))
    given = (x1, x2, gamma, beta, bias) if biased else (x1, x2, gamma, beta)
    y, mean, rstd, total = run("AddLayerNorm", *given, epsilon=EPSILON)
    exact = wide(x1) + wide(x2) + (wide(bias) if biased else 0)
    assert share_beside(total, rounded(exact, dtype)) == 0
    assert_close(mean, exact.mean(-1, keepdims=True), 1e-5)
    assert_rounded(y, rounded(layer_norm(exact, wide(gamma), wide(beta)), dtype))
    of_the_rounded_sum = layer_norm(rounded(exact, dtype), wide(gamma), wide(beta))
    assert share_beside(y, rounded(of_the_rounded_sum, dtype)) > 0.1, "a rounded sum is another"
    assert {x.dtype for x in (mean, rstd)} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES)
def test_layer_norm_rounds_once(dtype: torch.dtype) -> None:
    x, gamma, beta = normal(64, 256, dtype=dtype), normal(256, seed=1, dtype=dtype), normal(256, seed=2, dtype=dtype)
    y, mean, rstd = run("LayerNormV4", x, torch.tensor([256], dtype=torch.int32), gamma, beta, epsilon=EPSILON)
    assert_close(mean, wide(x).mean(-1, keepdims=True))
    assert_close(rstd, 1 / np.sqrt(wide(x).var(-1, keepdims=True) + EPSILON), 1e-5)
    assert_rounded(y, rounded(layer_norm(wide(x), wide(gamma), wide(beta)), dtype))
    plain = run("LayerNormV4", x.float(), torch.tensor([256]), epsilon=EPSILON)[0]
    assert_close(plain, layer_norm(wide(x), np.ones(256), np.zeros(256)), 1e-5)


@pytest.mark.parametrize(
    ("op", "inputs", "message"),
    [
        ("RmsNorm", (normal(2, 8), normal(4)), r"gamma \[4\] does not end the shape \[2, 8\]"),
        ("RmsNorm", (normal(2, 8), torch.tensor(1.0)), r"gamma \[\] does not end"),
        ("RmsNorm", (torch.ones(2, 8).int(), normal(8)), "got int32, expected fp32, fp16 or bf16"),
        ("AddRmsNorm", (normal(2, 8), normal(1, 8), normal(8)), r"adds \[2, 8\] and \[1, 8\], expected one shape"),
        ("AddRmsNorm", (normal(2, 8), normal(2, 8).half(), normal(8)), "float32, float16, expected one dtype"),
        ("AddLayerNorm", (normal(2, 8), normal(8), normal(8), normal(8)), "expected one shape"),
        ("AddLayerNorm", (*[normal(2, 8)] * 2, *[normal(8)] * 2, normal(1)), r"bias \[1\] float32 for x1 \[2, 8\]"),
    ],
)
def test_sums_and_gammas_that_do_not_fit_are_refused(op: str, inputs: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"{op} under_test: .*{message}"):
        run(op, *inputs, epsilon=EPSILON)


def test_socs_of_one_family_run_the_same_kernels() -> None:
    families = {
        "Ascend910B": ("Ascend910B2", "Ascend910B4-1"),
        "Ascend910_93": ("Ascend910_9391", "Ascend910_9362"),
        "Ascend950": ("Ascend950PR_9589", "Ascend910_9589"),
        "Ascend310P": ("Ascend310P3",),
        "Ascend1": ("Ascend1",),
    }
    assert all(soc_family(soc) == family for family, socs in families.items() for soc in socs)
