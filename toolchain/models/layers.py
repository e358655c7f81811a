"""The layers that vision towers and language models are made of, each one NPU operator or a few.

`torch.ops.npu` exists once torch_npu is imported; nothing here imports it.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised frozen parameter: tracing never looks at the values."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


class Norm(Protocol):
    """A normalisation of x [tokens, width], alone or fused with the residual addition before it."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (normalised sum, sum)."""
        ...


class Constants(nn.Module):
    """Tables that the graphs read and no checkpoint holds; `tables` have their shapes and dtypes."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, table in tables.items():
            self.register_parameter(name, parameter(*table.shape, dtype=table.dtype))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Tensor: ...


class Embedding(nn.Module):
    """Rows of a table [vocabulary, width] by index."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = parameter(vocabulary, width)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.weight)


class Linear(nn.Module):
    """x [tokens, inputs] to [tokens, outputs]; one MatMul with the weight as stored.

    npu_linear, because F.linear leaves a Transpose of every weight in the GE graph. The bias is fp32, which MatMul
    takes beside half-precision weights: CANN inserts a Cast before every node that has another.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs, dtype=torch.float32) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.npu.npu_linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.npu.npu_rms_norm(x, self.weight, self.eps)[0]

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _, total = torch.ops.npu.npu_add_rms_norm(residual, x, self.weight, self.eps)
        return y, total


class LayerNorm(nn.Module):
    """Layer normalisation."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = parameter(width)
        self.bias = parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y, _, _, total = torch.ops.npu.npu_add_layer_norm(residual, x, self.weight, self.bias, self.eps, True)
        return y, total


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), which is what FastGelu computes."""
    y: Tensor = torch.ops.npu.npu_fast_gelu(x)
    return y


def gelu(x: Tensor) -> Tensor:
    """With erf, which is GeluV2 with approximate="none": GE computes Gelu as tanh."""
    y: Tensor = torch.ops.npu.npu_gelu(x, approximate="none")
    return y


class Mlp(nn.Module):
    """fc1, an activation, fc2."""

    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner)
        self.fc2 = Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.activation(self.fc1(x)))
        return y


class GatedMlp(nn.Module):
    """SwiGLU over a fused gate and up projection."""

    def __init__(self, width: int, inner: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(width, 2 * inner, bias)
        self.down_proj = Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(torch.ops.npu.npu_swiglu(self.gate_up_proj(x)))
        return y
