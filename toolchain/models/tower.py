"""The vision tower: uint8 patches to embeddings of the language model.

Shapes: N patches, M = N / merge**2 merged tokens, E embed_dim, D head_dim, H the language model's width.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...runtime.models.base import MAX_VISION_SIDE, GraphOptions
from ...runtime.models.config import ModelConfig, VisionConfig
from . import decoder
from .attention import SegmentAttention, Segments
from .decoder import angles, cos_sin
from .layers import Constants, Linear, Norm, gelu

# the towers fix it; config.json has no field for it
_THETA = 10000.0
EPS = 1e-6


def tables(config: ModelConfig, options: GraphOptions) -> dict[str, Tensor]:
    """The constants of a tower before a decoder: vision_rope [sides, 2 D] is cos | sin of every coordinate,
    vision_rope_axes [2, 1, 2 D] selects the columns of rows and of columns; and the decoder's."""
    vision = config.vision
    axis = torch.repeat_interleave(torch.arange(2), vision.head_dim // 4).repeat(4)
    return {
        **decoder.tables(config.text, options),
        # rows and columns share the same angles, so one table serves both axes
        "vision_rope": cos_sin(angles(MAX_VISION_SIDE, vision.head_dim // 2, _THETA), 4),
        "vision_rope_axes": (axis == torch.arange(2)[:, None]).float()[:, None],
    }


class Block(nn.Module):
    """One transformer block; `norm1` is applied by the caller, fused with the addition before it."""

    def __init__(self, config: VisionConfig, norm: Callable[[], Norm], mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.attn = SegmentAttention(config)
        self.mlp = mlp


class Merger(nn.Module):
    """Concatenates the patches of each merge window and projects them to the language model's width."""

    def __init__(self, config: VisionConfig, norm: Norm) -> None:
        super().__init__()
        self.merged_dim = config.merged_dim
        self.ln_q = norm
        self.mlp = nn.ModuleDict(
            {"0": Linear(config.merged_dim, config.merged_dim), "2": Linear(config.merged_dim, config.hidden_size)}
        )

    def forward(self, residual: Tensor, x: Tensor) -> Tensor:
        y, _ = self.ln_q.add(residual, x)
        made: Tensor = self.mlp["2"](gelu(self.mlp["0"](y.view(-1, self.merged_dim))))
        return made


class Tower(nn.Module):
    """Patch embedding, blocks and merger; `norm` makes one of the tower's normalisations, `mlp` a block's MLP."""

    def __init__(self, config: VisionConfig, norm: Callable[[], Norm], mlp: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.patch_embed = Linear(config.patch_dim, config.embed_dim)
        # nn.ModuleList does not say what it holds
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config, norm, mlp()) for _ in range(config.depth))  # type: ignore[assignment]
        self.merger = Merger(config, norm())
        self.head_dim = config.head_dim

    def forward(self, patches: Tensor, positions: Tensor, segments: Sequence[Segments], constants: Constants) -> Tensor:
        """Embed pictures and frames: [M, H].

        patches uint8 [N, patch_dim], merge windows end to end; rescaling and normalisation are in the weights.
        positions int64 [2, N]: row and column of every patch. segments: of every block.
        """
        turned = (nn.functional.embedding(positions, constants.vision_rope) * constants.vision_rope_axes).sum(0)
        cos, sin = turned.view(1, -1, 1, 2 * self.head_dim).split([self.head_dim, self.head_dim], -1)
        x = residual = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        y = self.blocks[0].norm1(residual)
        for i, block in enumerate(self.blocks):
            if i > 0:
                y, residual = block.norm1.add(residual, x)
            y, residual = block.norm2.add(residual, block.attn(y, cos, sin, segments[i]))
            x = block.mlp(y)
        embeds: Tensor = self.merger(residual, x)
        return embeds
