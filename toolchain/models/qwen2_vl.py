"""Qwen2-VL's modules: its tower before Qwen2's decoder."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ...runtime.models.base import GraphOptions
from ...runtime.models.config import ModelConfig
from . import decoder, tower
from .attention import Segments
from .layers import LayerNorm, Mlp, quick_gelu

tables = tower.tables


class Qwen2VL(decoder.Decoder):
    """The whole model."""

    def __init__(self, config: ModelConfig, options: GraphOptions, tables: Mapping[str, Tensor]) -> None:
        super().__init__(config.text, options, tables)
        width = config.vision.embed_dim
        mlp = partial(Mlp, width, config.vision.mlp_dim, quick_gelu)
        self.visual = tower.Tower(config.vision, partial(LayerNorm, width, tower.EPS), mlp)

    def encode(self, patches: Tensor, positions: Tensor, segment_lengths: list[int]) -> Tensor:
        """patches uint8 [F, S, patch_dim], positions int64 [2, F, S]: F segments, each padded to S patches, with
        segment_lengths [F] the true ones; to embeddings [F * S / merge**2, H], padding included."""
        flat = patches.view(-1, patches.shape[-1])
        segments = Segments((patches.shape[0], patches.shape[1]), segment_lengths)
        return self._embed(flat, positions.view(2, -1), segments)

    def encode_packed(self, patches: Tensor, positions: Tensor, segment_ends: list[int]) -> Tensor:
        """patches uint8 [N, patch_dim], positions int64 [2, N], segment_ends: to embeddings [N / merge**2, H]."""
        return self._embed(patches, positions, Segments(None, segment_ends))

    def _embed(self, patches: Tensor, positions: Tensor, segments: Segments) -> Tensor:
        embeds: Tensor = self.visual(patches, positions, [segments] * len(self.visual.blocks), self.constants)
        return embeds


MODULES = Qwen2VL
