"""GE operators on CPU tensors: one pure function each, after the operator's documentation, and the table of them all.

Every function is called as f(node, *inputs) with None for an unfed input, and returns the tuple of outputs; whatever
is wrong with its inputs is an ArtifactError that names the node. fp16 and bf16 values are computed in fp32; where they
are rounded is what the device's kernels do: once at the output, but for AddRmsNorm, which depends on the SoC (norms).
The exceptions to purity are Scatter and ScatterNdUpdate, whose first input is updated in place.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ....artifacts.errors import ArtifactError
from ....artifacts.ge.graph import ATTRIBUTE_DTYPES, Node
from ....artifacts.soc import DEFAULT_SOC, soc_family
from . import shapes
from .attention import fused_infer_attention_score, incre_flash_attention, prompt_flash_attention
from .indexing import (
    gather,
    identity,
    reduce_all,
    reduce_sum,
    reshape,
    scatter,
    scatter_nd_update,
    split_v,
    tensor_move,
)
from .kernel import Operator, Outputs, attribute, axis, floating, ints, kernel, refused, required, same_dtype, unfed
from .norms import add_layer_norm, add_rms_norm, add_rms_norm_in_fp32, layer_norm, rms_norm
from .pointwise import (
    add,
    addcmul,
    fast_gelu,
    gelu,
    is_finite,
    mul,
    rotary_mul,
    rotary_position_embedding,
    select_v2,
    swi_glu,
)

TORCH_DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}
# Fewer rows than this are bound by reading the weight: then the half-precision kernel reads half the bytes. More rows
# are bound by arithmetic, which CPUs without units for the dtype do several times faster in fp32.
_GEMV_ROWS = 8


_WIDENED_VALUES = 1 << 26


@cache
def _bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices itself, accumulating in fp32 and rounding once, like the NPU."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _torch_dtype(node: Node, name: str, number: int) -> torch.dtype:
    if number not in ATTRIBUTE_DTYPES:
        raise refused(node, f"attribute {name}={number} is not a supported dtype")
    return TORCH_DTYPES[ATTRIBUTE_DTYPES[number]]


@kernel
def mat_mul(node: Node, x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: Tensor | None) -> Outputs:
    """aclnnMm / MatMul: x1 [m, k] x x2 [k, n] (each transposed by its attribute) + bias [n], accumulated in fp32."""
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
    parts = weight.split(max(1, _WIDENED_VALUES // max(1, weight.shape[1])))
    products = [F.linear(x, part.float()) for part in parts]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


@kernel
def arg_max(node: Node, x: Tensor, dimension: Tensor) -> Outputs:
    """ArgMaxV2: index of the first largest value along `dimension`."""
    (number,) = ints(node, dimension)
    return (x.argmax(axis(node, number, x)).to(_torch_dtype(node, "dtype", attribute(node, "dtype", 9))),)


@kernel
def cast(node: Node, x: Tensor) -> Outputs:
    """Cast to dst_type (a ge::DataType)."""
    return (x.to(_torch_dtype(node, "dst_type", required(node, "dst_type", 0))),)


OPERATORS: dict[str, Operator] = {
    "Add": add,
    "AddLayerNorm": add_layer_norm,
    "AddRmsNorm": add_rms_norm,
    "Addcmul": addcmul,
    "ArgMaxV2": arg_max,
    "Cast": cast,
    "FastGelu": fast_gelu,
    "FusedInferAttentionScore": fused_infer_attention_score,
    "Gather": shapes.gather,
    "GatherV2": gather,
    "GeluV2": gelu,
    "Identity": identity,
    "IncreFlashAttention": incre_flash_attention,
    "IsFinite": is_finite,
    "LayerNormV4": layer_norm,
    "MatMul": mat_mul,
    "Mul": mul,
    "Pack": shapes.pack,
    "PromptFlashAttention": prompt_flash_attention,
    "ReduceAll": reduce_all,
    "ReduceSum": reduce_sum,
    "Reshape": reshape,
    "RmsNorm": rms_norm,
    "RotaryMul": rotary_mul,
    "RotaryPositionEmbedding": rotary_position_embedding,
    "Scatter": scatter,
    "ScatterNdUpdate": scatter_nd_update,
    "SelectV2": select_v2,
    "Shape": shapes.shape,
    "SplitV": split_v,
    "SwiGlu": swi_glu,
    "TensorMove": tensor_move,
}
# The families whose kernels OPERATORS has, and what other SoCs compute in their place.
_ROUNDING_FAMILIES = ("Ascend910B", "Ascend910_93")
_ELSEWHERE: dict[str, Operator] = {"AddRmsNorm": add_rms_norm_in_fp32}


def operator(node: Node, where: str, soc: str = DEFAULT_SOC) -> Operator:
    """The function for a node, as `soc` computes it. Raises ArtifactError for an operator that this runtime does not
    know."""
    found = OPERATORS.get(node.op)
    if found is None:
        known = ", ".join(sorted(OPERATORS))
        raise ArtifactError(f"{where}: {node.where} is not an operator of the reference backend; it knows {known}")
    return found if soc_family(soc) in _ROUNDING_FAMILIES else _ELSEWHERE.get(node.op, found)
