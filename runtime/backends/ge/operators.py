"""GE operators on CPU tensors: one pure function each, after the operator's documentation.

Every function is called as f(node, *inputs) with None for an unfed input, and returns the tuple of outputs. fp16 and
bf16 values are computed in fp32 and rounded once at the output, as the NPU's kernels do. The two exceptions to purity
are Scatter and ScatterNdUpdate, whose first input is updated in place: that is their definition.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....artifacts.errors import ArtifactError
from .attention import fused_infer_attention_score, incre_flash_attention, prompt_flash_attention
from .graph import ATTRIBUTE_DTYPES, Node

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
Outputs = tuple[Tensor, ...]
Operator = Callable[..., Outputs]
# Fewer rows than this are bound by reading the weight: then the half-precision kernel reads half the bytes. More rows
# are bound by arithmetic, which CPUs without units for the dtype do several times faster in fp32.
_GEMV_ROWS = 8
# Values of an elementwise operator's temporaries: few enough to stay in the cache.
_BLOCK_VALUES = 1 << 18


@cache
def _bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices itself, accumulating in fp32 and rounding once, like the NPU."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _attribute_dtype(node: Node, name: str) -> torch.dtype:
    number = node.attributes[name]
    if number not in ATTRIBUTE_DTYPES:
        raise ArtifactError(f"{node.where}: attribute {name}={number} is not a supported dtype")
    return TORCH_DTYPES[ATTRIBUTE_DTYPES[number]]


def _ints(tensor: Tensor) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


def mat_mul(node: Node, x1: Tensor, x2: Tensor, bias: Tensor | None = None, *rest: None) -> Outputs:
    """aclnnMm / MatMul: x1 [m, k] x x2 [k, n] (each transposed by its attribute) + bias [n], accumulated in fp32."""
    if node.attributes.get("transpose_x1"):
        x1 = x1.t()
    weight = x2 if node.attributes.get("transpose_x2") else x2.t()
    native = x1.dtype == torch.float32 or x1.shape[0] < _GEMV_ROWS or (x1.dtype == torch.bfloat16 and _bf16_units())
    if native and (bias is None or bias.dtype == x1.dtype):
        return (F.linear(x1, weight, bias),)
    return (F.linear(x1.float(), weight.float(), None if bias is None else bias.float()).to(x1.dtype),)


def rms_norm(node: Node, x: Tensor, gamma: Tensor) -> Outputs:
    """RmsNorm: y = x / sqrt(mean(x^2) + epsilon) * gamma; rstd [.., 1] in fp32."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + node.attributes["epsilon"])
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


def add_rms_norm(node: Node, x1: Tensor, x2: Tensor, gamma: Tensor) -> Outputs:
    """AddRmsNorm: x = x1 + x2, rounded to the dtype, then RmsNorm of it. Outputs y, rstd, x."""
    total = x1 + x2
    y, rstd = rms_norm(node, total, gamma)
    return y, rstd, total


def layer_norm(node: Node, x: Tensor, normalized_shape: Tensor, gamma: Tensor, beta: Tensor) -> Outputs:
    """LayerNormV4 over the trailing normalized_shape; mean and rstd in fp32."""
    y, mean, rstd = torch.native_layer_norm(
        x.float(), _ints(normalized_shape), gamma.float(), beta.float(), node.attributes["epsilon"]
    )
    return y.to(x.dtype), mean, rstd


def add_layer_norm(
    node: Node, x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None = None
) -> Outputs:
    """AddLayerNorm: x = x1 + x2 (+ bias), rounded to the dtype, then layer normalisation. Outputs y, mean, rstd, x."""
    total = x1 + x2 if bias is None else x1 + x2 + bias
    shape = torch.tensor(gamma.shape)
    return (*layer_norm(node, total, shape, gamma, beta), total)


def rotary_mul(node: Node, x: Tensor, r1: Tensor, r2: Tensor) -> Outputs:
    """RotaryMul, half mode: y = x * r1 + concat(-x2, x1) * r2, where x = concat(x1, x2) on the last axis."""
    half = x.shape[-1] // 2
    wide, cos, sin = x.float(), r1.float(), r2.float()
    y = wide * cos
    y[..., :half] -= wide[..., half:] * sin[..., :half]
    y[..., half:] += wide[..., :half] * sin[..., half:]
    return (y.to(x.dtype),)


def swi_glu(node: Node, x: Tensor) -> Outputs:
    """SwiGlu: silu(a) * b, where x = concat(a, b) on axis `dim`."""
    a, b = x.float().chunk(2, node.attributes.get("dim", -1))
    return ((F.silu(a) * b).to(x.dtype),)


def fast_gelu(node: Node, x: Tensor) -> Outputs:
    """FastGelu: x / (1 + exp(-1.702 |x|)) * exp(0.851 (x - |x|)), which is x * sigmoid(1.702 x)."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, out in zip(x.reshape(-1).split(_BLOCK_VALUES), y.view(-1).split(_BLOCK_VALUES), strict=True):
        wide = part.float()
        out.copy_(torch.sigmoid(1.702 * wide).mul_(wide))
    return (y,)


def gelu(node: Node, x: Tensor) -> Outputs:
    """GeluV2: the erf form with approximate="none" (the attribute's default), the tanh form with "tanh"."""
    return (F.gelu(x.float(), approximate=node.attributes.get("approximate", "none")).to(x.dtype),)


def scatter(node: Node, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    """Scatter with reduce="update": writes updates[b] into var[b] at indices[b] along `axis`, in place."""
    if node.attributes["reduce"] != "update" or indices.dim() != 1 or len(indices) != len(var):
        raise ArtifactError(
            f"{node.where}: only reduce=update with one index a row is supported, got "
            f"{node.attributes['reduce']}, indices {list(indices.shape)}, var {list(var.shape)}"
        )
    axis = node.attributes["axis"] % var.dim()
    for row, start in enumerate(_ints(indices)):
        length = updates.shape[axis]
        if not 0 <= start <= var.shape[axis] - length:
            raise ArtifactError(
                f"{node.where}: writes {start} to {start + length} of axis {axis}, which has {var.shape[axis]}"
            )
        var[row].narrow(axis - 1, start, length).copy_(updates[row])
    return (var,)


def scatter_nd_update(node: Node, var: Tensor, indices: Tensor, updates: Tensor) -> Outputs:
    """ScatterNdUpdate: var[indices[i]] = updates[i], in place; indices [n, 1] address rows."""
    if indices.dim() != 2 or indices.shape[1] != 1:
        raise ArtifactError(f"{node.where}: indices have the shape {list(indices.shape)}, expected [n, 1]")
    var[indices[:, 0]] = updates
    return (var,)


def gather(node: Node, x: Tensor, indices: Tensor, axis: Tensor) -> Outputs:
    """GatherV2: rows of x along `axis`, batch_dims 0."""
    (dimension,) = _ints(axis)
    if node.attributes.get("batch_dims"):
        raise ArtifactError(f"{node.where}: batch_dims={node.attributes['batch_dims']} is not supported")
    dimension %= x.dim()
    picked = x.index_select(dimension, indices.reshape(-1))
    return (picked.reshape(*x.shape[:dimension], *indices.shape, *x.shape[dimension + 1 :]),)


def split_v(node: Node, x: Tensor, size_splits: Tensor, split_dim: Tensor) -> Outputs:
    """SplitV: consecutive parts of the given sizes along split_dim."""
    return x.split(_ints(size_splits), _ints(split_dim)[0])


def reshape(node: Node, x: Tensor, shape: Tensor) -> Outputs:
    """Reshape; 0 keeps a size, -1 is inferred."""
    if node.attributes.get("axis") or node.attributes.get("num_axes", -1) != -1:
        raise ArtifactError(f"{node.where}: only whole-shape Reshape is supported, got {node.attributes}")
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(_ints(shape))]
    return (x.reshape(sizes),)


def reduce_sum(node: Node, x: Tensor, axes: Tensor) -> Outputs:
    """ReduceSum over the given axes, accumulated in fp32."""
    return (x.float().sum(_ints(axes), keepdim=node.attributes["keep_dims"]).to(x.dtype),)


def arg_max(node: Node, x: Tensor, dimension: Tensor) -> Outputs:
    """ArgMaxV2: index of the first largest value along `dimension`."""
    return (x.argmax(_ints(dimension)[0]).to(_attribute_dtype(node, "dtype")),)


def cast(node: Node, x: Tensor) -> Outputs:
    """Cast to dst_type (a ge::DataType)."""
    return (x.to(_attribute_dtype(node, "dst_type")),)


def add(node: Node, x1: Tensor, x2: Tensor) -> Outputs:
    """Add, with broadcasting."""
    return (x1 + x2,)


def mul(node: Node, x1: Tensor, x2: Tensor) -> Outputs:
    """Mul, with broadcasting."""
    return (x1 * x2,)


def tensor_move(node: Node, x: Tensor) -> Outputs:
    """TensorMove: a copy with memory of its own, for an in-place operator behind it."""
    return (x.clone(),)


OPERATORS: dict[str, Operator] = {
    "Add": add,
    "AddLayerNorm": add_layer_norm,
    "AddRmsNorm": add_rms_norm,
    "ArgMaxV2": arg_max,
    "Cast": cast,
    "FastGelu": fast_gelu,
    "FusedInferAttentionScore": fused_infer_attention_score,
    "GatherV2": gather,
    "GeluV2": gelu,
    "IncreFlashAttention": incre_flash_attention,
    "LayerNormV4": layer_norm,
    "MatMul": mat_mul,
    "Mul": mul,
    "PromptFlashAttention": prompt_flash_attention,
    "ReduceSum": reduce_sum,
    "Reshape": reshape,
    "RmsNorm": rms_norm,
    "RotaryMul": rotary_mul,
    "Scatter": scatter,
    "ScatterNdUpdate": scatter_nd_update,
    "SplitV": split_v,
    "SwiGlu": swi_glu,
    "TensorMove": tensor_move,
}


def operator(node: Node, where: str) -> Operator:
    """The function for a node. Raises ArtifactError for an operator that this runtime does not know."""
    found = OPERATORS.get(node.op)
    if found is None:
        known: Any = ", ".join(sorted(OPERATORS))
        raise ArtifactError(f"{where}: {node.where} is not an operator of the reference backend; it knows {known}")
    return found
