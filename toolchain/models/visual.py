"""The vision tower: uint8 patches to embeddings of the language model.

Shapes: N patches, M = N / merge**2 merged tokens, E embed_dim, D head_dim, H the language model's width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...artifacts.config import VisionConfig
from .layers import LayerNorm, Linear


@dataclass(frozen=True)
class Segments:
    """How patches fall into segments.

    batch: (F, S), rows and patches in each, padding included, with `lengths` the true ones; or None, for segments
    packed end to end with `lengths` their cumulative ends (HF's cu_seqlens without the leading 0).
    """

    batch: tuple[int, int] | None
    lengths: list[int]


class Attention(nn.Module):
    """Full attention inside each segment (one frame group of one image)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.head_dim = config.head_dim
        self.width = config.embed_dim
        self.scale = config.head_dim**-0.5
        self.qkv = Linear(self.width, 3 * self.width)
        self.proj = Linear(self.width, self.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Segments) -> Tensor:
        # One split and two rotations: rotating q and k together takes a second split, which copies both once more.
        q, k, v = self.qkv(x).split([self.width, self.width, self.width], -1)
        q, k = (torch.ops.npu.npu_rotary_mul(t.view(1, -1, self.heads, self.head_dim), cos, sin) for t in (q, k))
        shape = (*segments.batch, self.width) if segments.batch else (-1, self.heads, self.head_dim)
        out = torch.ops.npu.npu_fused_infer_attention_score(
            *(t.view(shape) for t in (q, k, v)),
            # of the query, too: what lies behind a row's length costs nothing and comes out as zeros
            actual_seq_lengths=segments.lengths,
            actual_seq_lengths_kv=segments.lengths,
            num_heads=self.heads,
            # as many as heads, and written all the same: CANN's tiling of TND divides by the attribute
            num_key_value_heads=self.heads,
            scale=self.scale,
            input_layout="BSH" if segments.batch else "TND",
        )[0]
        return self.proj(out.view(-1, self.width))


class Mlp(nn.Module):
    """fc1, quick_gelu, fc2."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.embed_dim, config.mlp_dim)
        self.fc2 = Linear(config.mlp_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        # FastGelu is x * sigmoid(1.702 x): the quick_gelu that the checkpoint was trained with
        return self.fc2(torch.ops.npu.npu_fast_gelu(self.fc1(x)))


class Block(nn.Module):
    """One transformer block; `norm1` is applied by the caller, fused with the addition before it."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim)
        self.norm2 = LayerNorm(config.embed_dim)
        self.attn = Attention(config)
        self.mlp = Mlp(config)


class Merger(nn.Module):
    """Concatenates the patches of each merge window and projects them to the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merged_dim = config.merged_dim
        self.ln_q = LayerNorm(config.embed_dim)
        self.mlp = nn.ModuleDict(
            {"0": Linear(config.merged_dim, config.merged_dim), "2": Linear(config.merged_dim, config.hidden_size)}
        )

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        y, _ = self.ln_q.add(residual, x)
        y = self.mlp["0"](y.view(-1, self.merged_dim))
        # GE computes Gelu as tanh; the checkpoint was trained with erf, which is GeluV2 with approximate="none"
        return self.mlp["2"](torch.ops.npu.npu_gelu(y, approximate="none"))


class Visual(nn.Module):
    """The whole tower."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embed = Linear(config.patch_dim, config.embed_dim)
        # nn.ModuleList does not say what it holds
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.depth))  # type: ignore[assignment]
        self.merger = Merger(config)
        self.head_dim = config.head_dim

    def forward(
        self, patches: Tensor, positions: Tensor, segments: Segments, rope: Tensor, rope_axes: Tensor
    ) -> Tensor:
        """Embed pictures and frames.

        patches uint8 [N, patch_dim], in merge-window order; rescaling and normalisation are in the weights.
        positions int64 [2, N]: row and column of every patch.
        rope [sides, 2 D] holds cos | sin of every coordinate, rope_axes [2, 1, 2 D] selects each axis' columns.
        Returns [M, H].
        """
        angles = (nn.functional.embedding(positions, rope) * rope_axes).sum(0)
        cos, sin = angles.view(1, -1, 1, 2 * self.head_dim).split([self.head_dim, self.head_dim], -1)
        x = residual = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        y = self.blocks[0].norm1(residual)
        for i, block in enumerate(self.blocks):
            if i > 0:
                y, residual = block.norm1.add(residual, x)
            y, residual = block.norm2.add(residual, block.attn(y, cos, sin, segments))
            x = block.mlp(y)
        return self.merger(residual, x)
