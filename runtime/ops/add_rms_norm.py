"""AddRmsNorm: RmsNorm of x1 + x2. Outputs y, rstd in fp32, x = x1 + x2."""

from .base import Call, Eager, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor
from .norms import addends, reciprocal, rms_shape
from .rule import Rule, listed, nn, rows
from .shapes import fits


def shape(node: Call, x1: TensorSpec, x2: TensorSpec, gamma: TensorSpec) -> tuple[Shape, ...]:
    fits(x1 == x2, "the addends differ")
    return (*rms_shape(node, x1, gamma), x1.shape)


def run(node: Call, x1: Tensor, x2: Tensor, gamma: Tensor) -> Outputs:
    """Of SoCs that are not named otherwise, Ascend950 among them: fp32 up to the outputs."""
    addends(node, x1, x2)
    wide = x1.float() + x2.float()
    rstd = reciprocal(node, wide, gamma)
    return (wide * rstd * gamma.float()).to(x1.dtype), rstd, wide.to(x1.dtype)


def run_rounding(node: Call, x1: Tensor, x2: Tensor, gamma: Tensor) -> Outputs:
    """Of Ascend910B and Ascend910_93: the sum is rounded, then what gamma multiplies."""
    addends(node, x1, x2)
    total = x1 + x2
    wide = total.float()
    rstd = reciprocal(node, wide, gamma)
    scaled = (wide * rstd).to(x1.dtype)
    return (scaled.float() * gamma.float()).to(x1.dtype), rstd, total


OPERATOR = Operator(
    "AddRmsNorm",
    gives=(0, "fp32", 0),
    shape=shape,
    cost=moved,
    run=run,
    run_on={"Ascend910B": run_rounding, "Ascend910_93": run_rounding},
    eager=Eager(
        "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
        ("x1", "x2", "gamma"),
        ("epsilon",),
    ),
    rules=(
        Rule(
            "RN-02",
            "gamma has the last axis, and no axis is empty",
            "(and (eq in.gamma.dim-1 in.x1.dim-1) (gt in.x1.size 0))",
            "give gamma the last axis and dtype of x1",
            nn("9.1.0", "norm/add_rms_norm/op_host/add_rms_norm_tiling.cpp"),
        ),
        listed("AddRmsNorm", "x1 x2 gamma 0 1 2", rows("T T T T fp32 T", "bf16 fp16 fp32")),
    ),
)
