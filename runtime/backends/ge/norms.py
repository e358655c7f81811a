"""Normalisation on CPU, with the roundings of the device's kernels. In fp32 none of them matters.

Where they come from: the operators' published kernels and the functions that the vendor tests them against. x is the
sum, t the normalised value before gamma; round() is to the dtype of the inputs.

| operator | Ascend910B, Ascend910_93 | every other SoC |
|---|---|---|
| RmsNorm | y = round(x * rstd * gamma) | the same |
| AddRmsNorm | x = round(x1 + x2); t = round(x * rstd); y = round(t * gamma) | nothing but x and y, from the fp32 sum |
| AddLayerNorm | mean, variance and y from the fp32 sum; x = round(sum) | the same |
"""

import torch
from torch import Tensor

from ....artifacts.ge.graph import Node
from .kernel import Outputs, attribute, dtype_name, floating, ints, kernel, refused, same_dtype


def _rstd(node: Node, wide: Tensor, gamma: Tensor) -> Tensor:
    """1 / sqrt(mean(x^2) + epsilon) over the dimensions of gamma, which are the trailing ones of x and stay as 1."""
    floating(node, gamma)
    count = gamma.dim()
    if not count or wide.shape[-count:] != gamma.shape:
        raise refused(node, f"gamma {list(gamma.shape)} does not end the shape {list(wide.shape)}")
    mean = wide.square().mean(tuple(range(-count, 0)), keepdim=True)
    return torch.rsqrt(mean + attribute(node, "epsilon", 1e-6))


def _addends(node: Node, *tensors: Tensor) -> None:
    floating(node, *tensors)
    same_dtype(node, *tensors)
    if len({tensor.shape for tensor in tensors}) > 1:
        raise refused(node, f"adds {' and '.join(str(list(tensor.shape)) for tensor in tensors)}, expected one shape")


@kernel
def rms_norm(node: Node, x: Tensor, gamma: Tensor) -> Outputs:
    """RmsNorm: y = x / sqrt(mean(x^2) + epsilon) * gamma over all dimensions of gamma; rstd [.., 1] in fp32."""
    floating(node, x)
    wide = x.float()
    rstd = _rstd(node, wide, gamma)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@kernel
def add_rms_norm(node: Node, x1: Tensor, x2: Tensor, gamma: Tensor) -> Outputs:
    """AddRmsNorm of Ascend910B and Ascend910_93: the sum is rounded, then what gamma multiplies. Outputs y, rstd, x."""
    _addends(node, x1, x2)
    total = x1 + x2
    wide = total.float()
    rstd = _rstd(node, wide, gamma)
    scaled = (wide * rstd).to(x1.dtype)
    return (scaled.float() * gamma.float()).to(x1.dtype), rstd, total


@kernel
def add_rms_norm_in_fp32(node: Node, x1: Tensor, x2: Tensor, gamma: Tensor) -> Outputs:
    """AddRmsNorm of every other SoC, Ascend950 among them: fp32 up to the outputs. Outputs y, rstd, x."""
    _addends(node, x1, x2)
    wide = x1.float() + x2.float()
    rstd = _rstd(node, wide, gamma)
    return (wide * rstd * gamma.float()).to(x1.dtype), rstd, wide.to(x1.dtype)


def _layer_norm(
    node: Node, wide: Tensor, shape: list[int], gamma: Tensor | None, beta: Tensor | None, dtype: torch.dtype
) -> Outputs:
    floating(node, gamma, beta)
    y, mean, rstd = torch.native_layer_norm(
        wide,
        shape,
        None if gamma is None else gamma.float(),
        None if beta is None else beta.float(),
        attribute(node, "epsilon", 1e-5),
    )
    return y.to(dtype), mean, rstd


@kernel
def layer_norm(
    node: Node, x: Tensor, normalized_shape: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None
) -> Outputs:
    """LayerNormV4 over the trailing normalized_shape; mean and rstd in fp32."""
    floating(node, x)
    return _layer_norm(node, x.float(), ints(node, normalized_shape), gamma, beta, x.dtype)


@kernel
def add_layer_norm(
    node: Node, x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor | None = None
) -> Outputs:
    """AddLayerNorm: layer normalisation of x1 + x2 (+ bias), which stays fp32; x is that sum, rounded.

    bias has the shape of x1, or of its last dimension. Outputs y, mean, rstd, x.
    """
    _addends(node, x1, x2)
    total = x1.float() + x2.float()
    if bias is not None:
        if bias.dtype != x1.dtype or bias.shape not in (x1.shape, x1.shape[-1:]):
            raise refused(node, f"bias {list(bias.shape)} {dtype_name(bias)} for x1 {list(x1.shape)} {dtype_name(x1)}")
        total = total + bias.float()
    return (*_layer_norm(node, total, list(gamma.shape), gamma, beta, x1.dtype), total.to(x1.dtype))
