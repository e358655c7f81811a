"""What the normalisations share. On CPU they have the roundings of the device's kernels. In fp32 none of them matters.

Where they come from: the operators' published kernels and the functions that the vendor tests them against. x is the
sum, t the normalised value before gamma; round() is to the dtype of the inputs.

| operator | Ascend910B, Ascend910_93 | every other SoC |
|---|---|---|
| RmsNorm | y = round(x * rstd * gamma) | the same |
| AddRmsNorm | x = round(x1 + x2); t = round(x * rstd); y = round(t * gamma) | nothing but x and y, from the fp32 sum |
| AddLayerNorm | mean, variance and y from the fp32 sum; x = round(sum) | the same |
"""

from .base import Call, Shape, TensorSpec
from .kernel import Outputs, Tensor, attribute, floating, refused, same_dtype
from .shapes import fits


def reciprocal(node: Call, wide: Tensor, gamma: Tensor) -> Tensor:
    """rstd: 1 / sqrt(mean(x^2) + epsilon) over the dimensions of gamma, the trailing ones of x, which stay as 1."""
    import torch

    floating(node, gamma)
    count = gamma.dim()
    if not count or wide.shape[-count:] != gamma.shape:
        raise refused(node, f"gamma {list(gamma.shape)} does not end the shape {list(wide.shape)}")
    mean = wide.square().mean(tuple(range(-count, 0)), keepdim=True)
    return torch.rsqrt(mean + attribute(node, "epsilon", 1e-6))


def addends(node: Call, *tensors: Tensor) -> None:
    floating(node, *tensors)
    same_dtype(node, *tensors)
    if len({tensor.shape for tensor in tensors}) > 1:
        raise refused(node, f"adds {' and '.join(str(list(tensor.shape)) for tensor in tensors)}, expected one shape")


def layer_normalized(
    node: Call, wide: Tensor, shape: list[int], gamma: Tensor | None, beta: Tensor | None, like: Tensor
) -> Outputs:
    """y in the dtype of `like`, mean and rstd of x in fp32, over its trailing dimensions `shape`."""
    import torch

    floating(node, gamma, beta)
    y, mean, rstd = torch.native_layer_norm(
        wide,
        shape,
        None if gamma is None else gamma.float(),
        None if beta is None else beta.float(),
        attribute(node, "epsilon", 1e-5),
    )
    return y.to(like.dtype), mean, rstd


def rms_shape(node: Call, x: TensorSpec, gamma: TensorSpec) -> tuple[Shape, ...]:
    """y, and rstd [.., 1]."""
    fits(gamma.shape == x.shape[-1:], "gamma must have the size of the last axis")
    return x.shape, (*x.shape[:-1], 1)


def layer_shape(x: TensorSpec, axes: Shape) -> tuple[Shape, ...]:
    """y, mean and rstd; the last two with 1 for the normalised axes."""
    fits(x.shape[len(x.shape) - len(axes) :] == axes, f"the trailing axes are not {list(axes)}")
    moment = x.shape[: len(x.shape) - len(axes)] + (1,) * len(axes)
    return x.shape, moment, moment
