"""MatMul: x1 [m, k] x x2 [k, n] (each transposed by its attribute) + bias [n], accumulated in fp32 (aclnnMm)."""

from functools import cache
from math import prod

from .base import Call, Eager, OpCost, Operator, Shape, TensorSpec, Work, moved
from .kernel import Outputs, Tensor, attribute, floating, refused, same_dtype, unfed
from .rule import Rule, built, cann_8_1, nn, since
from .shapes import fits

# Fewer rows than this are bound by reading the weight: then the half-precision kernel reads half the bytes. More rows
# are bound by arithmetic, which CPUs without units for the dtype do several times faster in fp32.
_GEMV_ROWS = 8
_WIDENED_VALUES = 1 << 26


def shape(
    node: Call, x1: TensorSpec, x2: TensorSpec, bias: TensorSpec | None = None, *rest: TensorSpec | None
) -> tuple[Shape, ...]:
    m, k = reversed(x1.shape) if node.attributes.get("transpose_x1") else x1.shape
    rows, n = reversed(x2.shape) if node.attributes.get("transpose_x2") else x2.shape
    fits(k == rows, f"inner sizes {k} and {rows} differ")
    fits(bias is None or bias.shape == (n,), f"the bias must have {n} values")
    return ((m, n),)


def cost(node: Call, work: Work) -> OpCost:
    """2mnk FLOPs."""
    x1 = work.inputs[0]
    inner = x1.shape[0 if node.attributes.get("transpose_x1") else 1] if x1 else 0
    return OpCost(2 * prod(work.outputs[0].shape) * inner, moved(node, work).bytes)


@cache
def _bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices itself, accumulating in fp32 and rounding once, like the NPU."""
    import torch

    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def run(node: Call, x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: Tensor | None) -> Outputs:
    import torch
    import torch.nn.functional as F

    unfed(node, rest)
    floating(node, x1, bias)
    same_dtype(node, x1, x2)
    if x1.dim() != 2 or x2.dim() != 2:
        raise refused(node, f"multiplies {list(x1.shape)} by {list(x2.shape)}, expected two matrices")
    if attribute(node, "transpose_x1", False):
        x1 = x1.t()
    weight = x2 if attribute(node, "transpose_x2", False) else x2.t()
    if bias is not None and bias.shape != weight.shape[:1]:
        raise refused(node, f"bias {list(bias.shape)} for {weight.shape[0]} columns")
    native = x1.dtype == torch.float32 or x1.shape[0] < _GEMV_ROWS or (x1.dtype == torch.bfloat16 and _bf16_units())
    narrow = None if bias is None else bias.to(x1.dtype)
    # an fp32 bias that came from half precision is the same number there
    if native and (bias is None or narrow is bias or torch.equal(narrow.to(bias.dtype), bias)):  # type: ignore[union-attr]
        return (F.linear(x1, weight, narrow),)
    out = wide_product(x1.float(), weight)
    return ((out if bias is None else out.add_(bias.float())).to(x1.dtype),)


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [m, k] in fp32 times weight [n, k] in any dtype, transposed: a weight is widened a block of rows at a time, so
    that the largest takes 256 MB beside itself."""
    import torch
    import torch.nn.functional as F

    parts = weight.split(max(1, _WIDENED_VALUES // max(1, weight.shape[1])))
    products = [F.linear(x, part.float()) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


OPERATOR = Operator(
    "MatMul",
    shape=shape,
    cost=cost,
    run=run,
    eager=Eager(
        "npu_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor",
        ("input", "weight", "bias"),
        fixed={"transpose_x2": True},
    ),
    unwritten={"transpose_x1": False, "transpose_x2": False},
    rules=(
        Rule(
            "MM-01",
            "bf16 operands list a fp32 bias only: a bf16 bias is raised to fp32 by a Cast before each such node",
            "(eq in.bias.dtype 'fp32')",
            "convert the weights again: biases are fp32",
            nn("9.1.0", "matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp"),
            applies="(and in.bias.fed (eq in.x1.dtype 'bf16'))",
            severity="cost",
            inserts="Cast",
        ),
        Rule(
            "MM-02",
            "both operands rank 2, inner dimensions agree under transpose_x1/x2",
            "(and (eq in.x1.rank 2) (eq in.x2.rank 2) (eq (if attr.transpose_x1 in.x1.dim0 in.x1.dim1) "
            "(if attr.transpose_x2 in.x2.dim1 in.x2.dim0)))",
            "feed matrices",
            cann_8_1("op_proto/inc/matrix_calculation_ops.h"),
        ),
        Rule(
            "MM-03",
            "with bf16 operands a bias is fp32, or bf16 and raised to fp32",
            "(in in.bias.dtype fp32 bf16)",
            "convert the weights again: biases are fp32",
            nn("8.5.0", "matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp"),
            applies="(and in.bias.fed (eq in.x1.dtype 'bf16'))",
            releases=since("8.1"),
        ),
        Rule(
            "MM-04",
            "with fp16 operands a bias is fp16 or fp32, with fp32 operands fp32",
            "(or (eq in.bias.dtype 'fp32') (eq in.bias.dtype in.x1.dtype))",
            "convert the weights again: biases are fp32",
            nn("8.5.0", "matmul/mat_mul_v3/op_host/mat_mul_v3_def.cpp"),
            applies="(and in.bias.fed (in in.x1.dtype fp16 fp32))",
            releases=since("8.1"),
        ),
        built(
            "MatMul",
            "mat_mul",
            "x1 x2 0",
            ["bf16 bf16 bf16", "bf16 bf16 fp32", "fp16 fp16 fp16", "fp16 fp16 fp32", "fp32 fp32 fp32"],
        ),
    ),
)
