"""LayerNormV4 over the trailing normalized_shape; mean and rstd in fp32."""

from .base import Call, Operator, Shape, TensorSpec, moved
from .kernel import Outputs, Tensor, floating, ints
from .norms import layer_normalized, layer_shape
from .rule import Rule, listed, nn
from .shapes import values


def shape(node: Call, x: TensorSpec, axes: TensorSpec, gamma: TensorSpec, beta: TensorSpec) -> tuple[Shape, ...]:
    return layer_shape(x, values(axes))


def run(
    node: Call, x: Tensor, normalized_shape: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Outputs:
    floating(node, x)
    return layer_normalized(node, x.float(), ints(node, normalized_shape), gamma, beta, x)


OPERATOR = Operator(
    "LayerNormV4",
    gives=(0, "fp32"),
    shape=shape,
    cost=moved,
    run=run,
    rules=(
        Rule(
            "LN-01",
            "normalized_shape is int32 in the library of every release, and the engine has no rule from int64 to int32",
            "(eq in.normalized_shape.dtype 'int32')",
            "write the Const as int32",
            nn("9.1.0", "norm/layer_norm_v4/op_host/layer_norm_v4_def.cpp"),
            severity="unproven",
        ),
        Rule(
            "LN-02",
            "gamma and beta have the normalised axis, and no axis is empty",
            "(and (eq in.gamma.dim-1 in.x.dim-1) (eq in.beta.dim-1 in.x.dim-1) (gt in.x.size 0))",
            "give gamma and beta the normalised shape",
            nn("9.1.0", "norm/layer_norm_v4/op_host/layer_norm_v4_infershape.cpp"),
        ),
        listed(
            "LayerNormV4",
            "x gamma beta 0 1 2",
            [
                "bf16 bf16 bf16 bf16 fp32 fp32",
                "bf16 fp32 fp32 bf16 fp32 fp32",
                "fp16 fp16 fp16 fp16 fp32 fp32",
                "fp16 fp32 fp32 fp16 fp32 fp32",
                "fp32 fp32 fp32 fp32 fp32 fp32",
            ],
            nn("8.5.0", "norm/layer_norm_v4/op_host/layer_norm_v4_def.cpp"),
        ),
    ),
)
