"""The layers that the vision tower and the language model share, each one NPU operator.

`torch.ops.npu` exists once torch_npu is imported; nothing here imports it.
"""

import torch
from torch import Tensor, nn

# PromptFlashAttention hides what lies further ahead than next_tokens, 0 by default, whatever the mask says
ALL_TOKENS = 2147483647


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """An uninitialised frozen parameter: tracing never looks at the values."""
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


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
    """Root-mean-square normalisation of x [tokens, width], alone or fused with the residual addition before it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.npu.npu_rms_norm(x, self.weight, self.eps)[0]

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (normalised sum, sum)."""
        y, _, total = torch.ops.npu.npu_add_rms_norm(residual, x, self.weight, self.eps)
        return y, total


class LayerNorm(nn.Module):
    """Layer normalisation of x [tokens, width], alone or fused with the residual addition before it."""

    # Qwen2-VL's vision tower fixes it; config.json has no field for it
    EPS = 1e-6

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = parameter(width)
        self.bias = parameter(width)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.EPS)

    def add(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (normalised sum, sum)."""
        y, _, _, total = torch.ops.npu.npu_add_layer_norm(residual, x, self.weight, self.bias, self.EPS, True)
        return y, total
