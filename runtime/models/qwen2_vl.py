"""Qwen2-VL: full attention in every frame group, LayerNorm and quick_gelu in the tower, Qwen2's decoder behind it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import qwen2
from .base import (
    Argument,
    Family,
    GraphOptions,
    GraphSpec,
    Picture,
    Split,
    VisualLimits,
    Weight,
    linear,
    norm,
    patch_embedding,
)
from .config import ModelConfig, VisionConfig
from .fields import LARGEST_SIZE, Section
from .positions import check_sizes, rope_positions, segment_ends, vision_positions
from .segments import Run, VisualCall, pieces, plan_packed, plan_runs, rows_of

# What transformers' vision config takes for a field that is left out, in all of 4.45 to 5.23; 4.45 to 4.50 save only
# what differs from it.
VISION_DEFAULTS: Mapping[str, Any] = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def read_config(plain: dict[str, Any]) -> ModelConfig:
    """config.json of a published checkpoint or a fine-tune. Raises ConfigError."""
    return qwen2.read_config(plain, ModelConfig, read_vision, VISION_DEFAULTS)


def read_vision(vision: Section) -> VisionConfig:
    embed_dim = vision.whole("embed_dim")
    mlp_dim = embed_dim * vision.number("mlp_ratio")
    if not 1 <= mlp_dim < LARGEST_SIZE:
        raise vision.error("mlp_ratio", f"embed_dim {embed_dim} times it from 1 to {LARGEST_SIZE - 1}")
    config = VisionConfig(
        depth=vision.whole("depth"),
        embed_dim=embed_dim,
        num_heads=vision.whole("num_heads"),
        mlp_dim=int(mlp_dim),
        in_channels=vision.whole("in_channels"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        spatial_merge_size=vision.whole("spatial_merge_size"),
        hidden_size=vision.whole("hidden_size"),
    )
    vision.only("hidden_act", "quick_gelu")
    # the published files' name, which no version of transformers reads
    vision.same("in_chans", config.in_channels, "in_channels")
    # names that transformers takes for these since version 5
    vision.same("num_attention_heads", config.num_heads, "num_heads")
    vision.same("num_hidden_layers", config.depth, "depth")
    vision.plain_rope()
    return config


def weights(config: ModelConfig) -> Iterator[Weight]:
    """Every tensor in load order: the tower first, since it runs first."""
    yield from tower_weights(config.vision)
    yield from qwen2.weights(config.text)


def tower_weights(vision: VisionConfig) -> Iterator[Weight]:
    """The vision tower's."""
    width, merged = vision.embed_dim, vision.merged_dim
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield from patch_embedding("visual.patch_embed", "visual.patch_embed.proj.weight", width, kernel)
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        yield from norm(f"{block}.norm1", width, shift=True, reads="the residual stream")
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width, split=Split.ROW, reads="the attention's output")
        yield from norm(f"{block}.norm2", width, shift=True, reads="the residual stream after attention")
        yield from linear(f"{block}.mlp.fc1", vision.mlp_dim, width)
        yield from linear(f"{block}.mlp.fc2", width, vision.mlp_dim, split=Split.ROW, reads="quick_gelu's output")
    yield from norm("visual.merger.ln_q", width, shift=True, reads="the residual stream")
    yield from linear("visual.merger.mlp.0", merged, merged)
    yield from linear("visual.merger.mlp.2", vision.hidden_size, merged, split=Split.ROW, reads="GELU's output")


def graphs(config: ModelConfig, options: GraphOptions) -> tuple[GraphSpec, ...]:
    """visual, prefill, decode_b<rows>."""
    return (visual_graph(config.vision, options), *qwen2.graphs(config.text, options))


def visual_graph(vision: VisionConfig, options: GraphOptions) -> GraphSpec:
    """patches uint8 in merge-window order, the row and column of each, and how they fall into segments."""
    embeds = (Argument("embeds", "model", ("image_tokens", vision.hidden_size)),)
    arguments: tuple[Argument, ...]
    by_row = options.visual_attention in ("segments", "equal")
    if by_row:
        arguments = (
            Argument("patches", "uint8", ("segments", "longest", vision.patch_dim)),
            Argument("positions", "int64", (2, "segments", "longest"), indexes="vision_rope"),
        )
        if options.visual_attention == "segments":
            arguments += (Argument("segment_lengths", "int64", ("segments",), "lengths"),)
    else:
        last = Argument("segment_ends", "int64", ("segments",), "lengths")
        if options.visual_attention == "masked":
            last = Argument("segment_mask", "bool", (1, 1, "patches", "patches"))
        arguments = (
            Argument("patches", "uint8", ("patches", vision.patch_dim)),
            Argument("positions", "int64", (2, "patches"), indexes="vision_rope"),
            last,
        )
    method = "encode" if by_row else "encode_packed"
    return GraphSpec("visual", "visual", method, arguments, embeds)


class SegmentInputs:
    """Pictures whose patches attend within their frame group."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def visual(
        self, patches: NDArray[np.uint8], grids: NDArray[np.int64], limits: VisualLimits
    ) -> Iterator[VisualCall]:
        merge = self.config.vision.spatial_merge_size
        ends, positions = segment_ends(grids), vision_positions(grids, merge)
        check_sizes(grids, ends, limits)
        if limits.attention in ("segments", "equal"):
            runs = plan_runs(ends, limits.most, pads=limits.attention == "segments")
        else:
            runs = plan_packed(ends, limits.most, limits.packed)
        for run in runs:
            taken, places = rows_of(run, ends, patches, positions)
            yield _call(run, taken, places, limits.attention, pieces(run, ends, merge))

    def order(self, grids: NDArray[np.int64]) -> None:
        """The visual graph's rows are in the order of the placeholders."""

    def positions(
        self, token_ids: NDArray[np.int64], pictures: Sequence[Picture], start: int = 0
    ) -> tuple[NDArray[np.int64], int]:
        return rope_positions(token_ids, pictures, self.config, start)


def _call(
    run: Run, patches: NDArray[np.uint8], positions: NDArray[np.int64], attention: str, rows: tuple[Any, ...]
) -> VisualCall:
    if attention in ("segments", "equal"):
        # rows of one length need no lengths
        lengths = {"segment_lengths": list(run.lengths)} if attention == "segments" else {}
        return VisualCall({"patches": patches, "positions": positions}, lengths, rows)
    packed: dict[str, NDArray[Any]] = {
        "patches": patches.reshape(-1, patches.shape[2]),
        "positions": positions.reshape(2, -1),
    }
    ends = np.cumsum(run.packed)
    if attention == "masked":
        segment = np.searchsorted(ends, np.arange(patches.shape[0] * patches.shape[1]), side="right")
        return VisualCall({**packed, "segment_mask": (segment[:, None] != segment[None])[None, None]}, {}, rows)
    return VisualCall(packed, {"segment_ends": ends.tolist()}, rows)


FAMILY = Family(
    name="qwen2_vl",
    config=ModelConfig,
    read_config=read_config,
    weights=weights,
    graphs=graphs,
    inputs=SegmentInputs,
)
