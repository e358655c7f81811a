"""Qwen2.5-VL's modules: a tower that attends in windows before Qwen2's decoder."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from ...runtime.models.base import GraphOptions
from ...runtime.models.qwen2_5_vl import Qwen25VLConfig
from . import decoder, tower
from .attention import Segments
from .layers import GatedMlp, RMSNorm

tables = tower.tables


class Qwen25VL(decoder.Decoder):
    """The whole model."""

    def __init__(self, config: Qwen25VLConfig, options: GraphOptions, tables: Mapping[str, Tensor]) -> None:
        super().__init__(config.text, options, tables)
        vision = config.vision
        mlp = partial(GatedMlp, vision.embed_dim, vision.stored_mlp_dim, bias=True)
        self.visual = tower.Tower(vision, partial(RMSNorm, vision.embed_dim, tower.EPS), mlp)
        self.full = [block in vision.full_blocks for block in range(vision.depth)]

    def encode(
        self,
        patches: Tensor,
        positions: Tensor,
        keys: Tensor,
        window_lengths: list[int],
        segment_lengths: list[int],
    ) -> Tensor:
        """patches uint8 [W, P, patch_dim], positions int64 [2, W, P]: W windows, each padded to P patches, with
        window_lengths [W] the true ones, equally many of each of F segments. keys int64 [F, S]: which of the W * P rows
        each segment has, segment_lengths [F] of them. To embeddings [W * P / merge**2, H], padding included."""
        windows = Segments((patches.shape[0], patches.shape[1]), window_lengths)
        # of the query all rows: those of padding are read by nobody
        whole = Segments((keys.shape[0], -1), segment_lengths, keys)
        return self._embed(patches.view(-1, patches.shape[-1]), positions.view(2, -1), windows, whole)

    def encode_packed(
        self, patches: Tensor, positions: Tensor, window_ends: list[int], segment_ends: list[int]
    ) -> Tensor:
        """patches uint8 [N, patch_dim], positions int64 [2, N], windows end to end; to embeddings [N / merge**2, H]."""
        return self._embed(patches, positions, Segments(None, window_ends), Segments(None, segment_ends))

    def _embed(self, patches: Tensor, positions: Tensor, windows: Segments, whole: Segments) -> Tensor:
        segments = [whole if full else windows for full in self.full]
        embeds: Tensor = self.visual(patches, positions, segments, self.constants)
        return embeds


MODULES = Qwen25VL
