"""Qwen2.5-VL: attention in windows of a picture but for a few blocks, RMSNorm and SwiGLU in the tower, a clock on the
time axis of clips; Qwen2's decoder behind it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import RequestError
from ...artifacts.ge.ops import MOST_PATCHES
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
from .fields import Section
from .positions import as_grids, check_sizes, rope_positions, segment_ends, vision_positions
from .segments import Run, VisualCall, joined, plan_packed, plan_runs

# What transformers' vision config takes for a field that is left out.
VISION_DEFAULTS: Mapping[str, Any] = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "tokens_per_second": 4,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
# The MLP's inner width, 3420 as published, is made a multiple of it with zeros, which change nothing: silu(0) * 0 = 0.
# The device's matrices want multiples of 16, and int8's of 32.
_WIDTH_STEP = 128


@dataclass(frozen=True)
class WindowedVisionConfig(VisionConfig):
    """A tower whose blocks attend within windows of window_size x window_size pixels, but for full_blocks."""

    window_size: int
    full_blocks: tuple[int, ...]
    tokens_per_second: int

    @property
    def window_side(self) -> int:
        """Merge windows on a side of an attention window."""
        return self.window_size // (self.patch_size * self.spatial_merge_size)

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return (self.window_side * self.spatial_merge_size) ** 2

    @property
    def stored_mlp_dim(self) -> int:
        return -(-self.mlp_dim // _WIDTH_STEP) * _WIDTH_STEP


@dataclass(frozen=True)
class Qwen25VLConfig(ModelConfig):
    """A Qwen2.5-VL."""

    vision: WindowedVisionConfig

    def contradiction(self) -> str | None:
        if problem := super().contradiction():
            return problem
        vision = self.vision
        if vision.window_size % (vision.patch_size * vision.spatial_merge_size) or vision.window_patches > MOST_PATCHES:
            return (
                f"vision window_size is {vision.window_size}, expected a multiple of patch_size {vision.patch_size} "
                f"times spatial_merge_size {vision.spatial_merge_size}, of at most {MOST_PATCHES} patches in all"
            )
        if not all(0 <= block < vision.depth for block in vision.full_blocks):
            return f"vision fullatt_block_indexes are {list(vision.full_blocks)}, of {vision.depth} blocks"
        return None


def read_config(plain: dict[str, Any]) -> ModelConfig:
    """config.json of a published checkpoint or a fine-tune. Raises ConfigError."""
    return qwen2.read_config(plain, Qwen25VLConfig, _read_vision, VISION_DEFAULTS)


def _read_vision(vision: Section) -> WindowedVisionConfig:
    full = vision.fields.get("fullatt_block_indexes", vision.defaults["fullatt_block_indexes"])
    if not isinstance(full, list) or not all(type(block) is int for block in full):
        raise vision.error("fullatt_block_indexes", "a list of integers")
    config = WindowedVisionConfig(
        depth=vision.whole("depth"),
        embed_dim=vision.whole("hidden_size"),
        num_heads=vision.whole("num_heads"),
        mlp_dim=vision.whole("intermediate_size"),
        in_channels=vision.whole("in_channels"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        spatial_merge_size=vision.whole("spatial_merge_size"),
        hidden_size=vision.whole("out_hidden_size"),
        window_size=vision.whole("window_size"),
        full_blocks=tuple(full),
        tokens_per_second=vision.whole("tokens_per_second"),
    )
    vision.only("hidden_act", "silu")
    # the published files' name, which no version of transformers reads
    vision.same("in_chans", config.in_channels, "in_channels")
    vision.same("num_attention_heads", config.num_heads, "num_heads")
    vision.same("num_hidden_layers", config.depth, "depth")
    vision.plain_rope()
    return config


def weights(config: Qwen25VLConfig) -> Iterator[Weight]:
    """Every tensor in load order: the tower first, since it runs first."""
    vision = config.vision
    width, merged, inner, stored = vision.embed_dim, vision.merged_dim, vision.mlp_dim, vision.stored_mlp_dim
    kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    yield from patch_embedding("visual.patch_embed", "visual.patch_embed.proj.weight", width, kernel)
    for i in range(vision.depth):
        block = f"visual.blocks.{i}"
        gates = {"gate_proj": inner, "up_proj": inner}
        yield from norm(f"{block}.norm1", width, reads="the residual stream")
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width, split=Split.ROW, reads="the attention's output")
        yield from norm(f"{block}.norm2", width, reads="the residual stream after attention")
        yield from linear(f"{block}.mlp.gate_up_proj", 2 * inner, width, parts=gates, padded=(stored, width))
        yield from linear(
            f"{block}.mlp.down_proj", width, inner, padded=(width, stored), split=Split.ROW, reads="SwiGLU's output"
        )
    yield from norm("visual.merger.ln_q", width, reads="the residual stream")
    yield from linear("visual.merger.mlp.0", merged, merged)
    yield from linear("visual.merger.mlp.2", vision.hidden_size, merged, split=Split.ROW, reads="GELU's output")
    yield from qwen2.weights(config.text)


def graphs(config: Qwen25VLConfig, options: GraphOptions) -> tuple[GraphSpec, ...]:
    """visual, prefill, decode_b<rows>.

    visual takes patches window by window. Of "segments", a row is a window, padded to a whole one; keys are the rows
    that belong to each segment, for the blocks that attend to all of it; of "equal", all segments have as many.
    """
    vision = config.vision
    embeds = (Argument("embeds", "model", ("image_tokens", vision.hidden_size)),)
    arguments: tuple[Argument, ...]
    if options.visual_attention in ("segments", "equal"):
        arguments = (
            Argument("patches", "uint8", ("windows", vision.window_patches, vision.patch_dim)),
            Argument("positions", "int64", (2, "windows", vision.window_patches), indexes="vision_rope"),
            Argument("keys", "int64", ("segments", "longest")),
            Argument("window_lengths", "int64", ("windows",), "lengths"),
        )
        if options.visual_attention == "segments":
            arguments += (Argument("segment_lengths", "int64", ("segments",), "lengths"),)
        method = "encode"
    else:
        arguments = (
            Argument("patches", "uint8", ("patches", vision.patch_dim)),
            Argument("positions", "int64", (2, "patches"), indexes="vision_rope"),
            Argument("window_ends", "int64", ("windows",), "lengths"),
            Argument("segment_ends", "int64", ("segments",), "lengths"),
        )
        method = "encode_packed"
    return (GraphSpec("visual", "visual", method, arguments, embeds), *qwen2.graphs(config.text, options))


def sizes(config: Qwen25VLConfig, segments: Sequence[int]) -> dict[str, int]:
    """As few windows as hold the patches: of segments of different sizes as many each as the largest has."""
    return {"windows": len(segments) * math.ceil(max(segments) / config.vision.window_patches)}


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of one frame group: merge windows [count] in their order, and how many each of them has."""

    order: NDArray[np.int64]
    counts: NDArray[np.int64]


def windows_of(height: int, width: int, side: int) -> Windows:
    """Of height x width merge windows, in rows of `side` x `side` ones: transformers' get_vision_window_index."""
    rows, columns = np.indices((height, width))
    number = rows // side * (-(-width // side)) + columns // side
    # a stable sort keeps the order within a window
    return Windows(np.argsort(number.ravel(), kind="stable"), np.bincount(number.ravel()))


class WindowInputs:
    """Pictures whose patches are laid out window by window; prefill puts the embeddings where they belong."""

    def __init__(self, config: Qwen25VLConfig) -> None:
        self.config = config
        self._merge = config.vision.spatial_merge_size**2

    def visual(
        self, patches: NDArray[np.uint8], grids: NDArray[np.int64], limits: VisualLimits
    ) -> Iterator[VisualCall]:
        merge = self._merge
        ends = segment_ends(grids)
        segments = self._segments(grids)
        order = (_order(segments)[:, None] * merge + np.arange(merge)).ravel()
        patches, positions = patches[order], vision_positions(grids, self.config.vision.spatial_merge_size)[:, order]
        if limits.attention == "tnd":
            check_sizes(grids, ends, limits)
            windows = max(len(each.counts) for each in segments)
            if windows > limits.packed:
                raise RequestError(
                    f"a picture has {windows:,} windows, the visual graph takes {limits.packed:,}; make it smaller, "
                    "with max_pixels for instance"
                )
            for run in plan_packed(ends, limits.most, limits.packed // windows):
                yield self._packed(run, segments, ends, patches, positions)
            return
        area = self.config.vision.window_patches
        padded = np.cumsum([len(windows.counts) * area for windows in segments]).tolist()
        check_sizes(grids, padded, limits)
        equal = limits.attention == "equal"
        for run in plan_runs(padded, limits.most, pads=False):
            together: dict[int, list[int]] = {}
            for i in run.segments:
                together.setdefault(int(segments[i].counts.sum()) if equal else 0, []).append(i)
            for these in together.values():
                taken = [segments[i] for i in these], [ends[i] for i in these]
                yield self._rows(*taken, patches, positions, equal)

    def _packed(
        self,
        run: Run,
        segments: list[Windows],
        ends: list[int],
        patches: NDArray[np.uint8],
        positions: NDArray[np.int64],
    ) -> VisualCall:
        """Segments end to end, and their windows."""
        end, merge = run.segments[0] + 1, self._merge
        first = end - len(run.packed)
        begin, stop = ends[first] - run.packed[0], ends[end - 1]
        counts = np.concatenate([windows.counts for windows in segments[first:end]]) * merge
        lengths = {"window_ends": np.cumsum(counts).tolist(), "segment_ends": np.cumsum(run.packed).tolist()}
        given: dict[str, NDArray[Any]] = {"patches": patches[begin:stop], "positions": positions[:, begin:stop]}
        return VisualCall(given, lengths, joined([(0, (stop - begin) // merge, begin // merge)]))

    def _rows(
        self,
        segments: list[Windows],
        ends: list[int],
        patches: NDArray[np.uint8],
        positions: NDArray[np.int64],
        equal: bool,
    ) -> VisualCall:
        """Segments of equally many windows, a window a row. equal: segments of one length, which need none."""
        merge, area = self._merge, self.config.vision.window_patches
        counts = np.concatenate([windows.counts for windows in segments]) * merge
        totals = [int(windows.counts.sum()) * merge for windows in segments]
        taken = np.zeros((len(counts), area, patches.shape[1]), np.uint8)
        places = np.zeros((2, len(counts), area), np.int64)
        keys = np.zeros((len(segments), max(totals)), np.int64)
        valid = np.arange(area) < counts[:, None]
        source = np.concatenate([np.arange(end - total, end) for end, total in zip(ends, totals, strict=True)])
        taken[valid], places[:, valid] = patches[source], positions[:, source]
        rows = np.flatnonzero(valid.ravel())
        begins = np.cumsum([0, *totals])
        for i, total in enumerate(totals):
            keys[i, :total] = rows[begins[i] : begins[i + 1]]
        # the first row of each window in the output, how many it has, and the first of them among all embeddings
        firsts = np.arange(len(counts)) * (area // merge)
        targets = source[np.cumsum([0, *counts[:-1]])] // merge
        pieces = joined(zip(firsts.tolist(), (counts // merge).tolist(), targets.tolist(), strict=True))
        given: dict[str, NDArray[Any]] = {"patches": taken, "positions": places, "keys": keys}
        lengths = {"window_lengths": counts.tolist()} | ({} if equal else {"segment_lengths": totals})
        return VisualCall(given, lengths, pieces)

    def _segments(self, grids: NDArray[np.int64]) -> list[Windows]:
        """The windows of every frame group."""
        merge, side = self.config.vision.spatial_merge_size, self.config.vision.window_side
        pictures = [(t, windows_of(h // merge, w // merge, side)) for t, h, w in as_grids(grids, merge).tolist()]
        return [windows for groups, windows in pictures for _ in range(groups)]

    def order(self, grids: NDArray[np.int64]) -> NDArray[np.int64]:
        return _order(self._segments(grids))

    def positions(
        self, token_ids: NDArray[np.int64], pictures: Sequence[Picture], start: int = 0
    ) -> tuple[NDArray[np.int64], int]:
        axis = partial(_by_clock, self.config.vision.tokens_per_second)
        return rope_positions(token_ids, pictures, self.config, start, axis)


def _order(segments: Sequence[Windows]) -> NDArray[np.int64]:
    """The merge windows of all segments, window by window."""
    parts, begin = [np.empty(0, np.int64)], 0
    for windows in segments:
        parts.append(windows.order + begin)
        begin += len(windows.order)
    return np.concatenate(parts)


def _by_clock(tokens_per_second: int, steps: NDArray[np.int64], seconds: float) -> NDArray[np.int64]:
    """The time axis counts tokens_per_second, rounded down, in the fp32 arithmetic of the training code."""
    return (steps.astype(np.float32) * np.float32(seconds) * np.float32(tokens_per_second)).astype(np.int64)


FAMILY = Family(
    name="qwen2_5_vl",
    config=Qwen25VLConfig,
    read_config=read_config,
    weights=weights,
    graphs=graphs,
    inputs=WindowInputs,
    sizes=sizes,
)
