"""RmsNorm: y = x / sqrt(mean(x^2) + epsilon) * gamma over all dimensions of gamma; rstd [.., 1] in fp32."""

from .base import Call, Eager, Operator, moved
from .kernel import Outputs, Tensor, floating
from .norms import reciprocal, rms_shape
from .rule import Rule, listed, nn


def run(node: Call, x: Tensor, gamma: Tensor) -> Outputs:
    floating(node, x)
    wide = x.float()
    rstd = reciprocal(node, wide, gamma)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


OPERATOR = Operator(
    "RmsNorm",
    gives=(0, "fp32"),
    shape=rms_shape,
    cost=moved,
    run=run,
    eager=Eager(
        "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
        ("input", "gamma"),
        ("epsilon",),
    ),
    rules=(
        Rule(
            "RN-01",
            "gamma has the last axis, and no axis is empty",
            "(and (eq in.gamma.dim-1 in.x.dim-1) (gt in.x.size 0))",
            "give gamma the last axis of x",
            nn("9.1.0", "norm/rms_norm/op_host/rms_norm_def.cpp"),
        ),
        listed(
            "RmsNorm",
            "x gamma 0 1",
            [
                "bf16 bf16 bf16 fp32",
                "bf16 fp32 bf16 fp32",
                "fp16 fp16 fp16 fp32",
                "fp16 fp32 fp16 fp32",
                "fp32 fp32 fp32 fp32",
            ],
        ),
    ),
)
