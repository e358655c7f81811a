"""AddLayerNorm: layer normalisation of x1 + x2 (+ bias), which stays fp32. Outputs y, mean, rstd, x: that sum, rounded.

bias has the shape of x1, or of its last dimension.
"""

from .base import Call, Eager, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, dtype_name, refused
from .norms import addends, layer_normalized, layer_shape
from .rule import Rule, listed, nn
from .shapes import fits


def shape(
    node: Call, x1: TensorSpec, x2: TensorSpec, gamma: TensorSpec, beta: TensorSpec, bias: TensorSpec | None = None
) -> tuple[Shape, ...]:
    fits(x1 == x2, "the addends differ")
    return (*layer_shape(x1, gamma.shape), x1.shape)


def run(node: Call, x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None = None) -> Outputs:
    addends(node, x1, x2)
    total = x1.float() + x2.float()
    if bias is not None:
        if bias.dtype != x1.dtype or bias.shape not in (x1.shape, x1.shape[-1:]):
            raise refused(node, f"bias {list(bias.shape)} {dtype_name(bias)} for x1 {list(x1.shape)} {dtype_name(x1)}")
        total = total + bias.float()
    return (*layer_normalized(node, total, list(gamma.shape), gamma, beta, x1), total.to(x1.dtype))


OPERATOR = Operator(
    "AddLayerNorm",
    gives=(0, "fp32", "fp32", 0),
    shape=shape,
    cost=moved,
    run=run,
    eager=Eager(
        "npu_add_layer_norm(Tensor x1, Tensor x2, Tensor gamma, Tensor beta, float epsilon=1e-05, "
        "bool additional_output=False) -> (Tensor, Tensor, Tensor, Tensor)",
        ("x1", "x2", "gamma", "beta"),
        ("epsilon",),
        only={"additional_output": True},
    ),
    rules=(
        Rule(
            "ALN-01",
            "1 to 8 axes, none empty; gamma and beta have the last axis",
            "(and (le in.x1.rank 8) (gt in.x1.size 0) (eq in.gamma.dim-1 in.x1.dim-1) (eq in.beta.dim-1 in.x1.dim-1))",
            "give gamma and beta the dtype and last axis of x1",
            nn("9.1.0", "norm/add_layer_norm/op_host/add_layer_norm_tiling.cpp"),
        ),
        listed(
            "AddLayerNorm",
            "x1 x2 gamma beta 0 1 2 3",
            [
                "bf16 bf16 bf16 bf16 bf16 fp32 fp32 bf16",
                "bf16 bf16 fp32 fp32 bf16 fp32 fp32 bf16",
                "bf16 fp32 fp32 fp32 fp32 fp32 fp32 fp32",
                "fp16 fp16 fp16 fp16 fp16 fp32 fp32 fp16",
                "fp16 fp16 fp32 fp32 fp16 fp32 fp32 fp16",
                "fp16 fp32 fp32 fp32 fp32 fp32 fp32 fp32",
                "fp32 bf16 fp32 fp32 fp32 fp32 fp32 fp32",
                "fp32 fp16 fp32 fp32 fp32 fp32 fp32 fp32",
                "fp32 fp32 fp32 fp32 fp32 fp32 fp32 fp32",
            ],
        ),
    ),
)
