"""The vision tower as ONNX, following toolchain/models/visual.py operator by operator.

Segments attend to nothing outside themselves, so the model takes segments of one length and needs no mask: those of
other lengths are another call. Shapes: B segments, N patches in each, E embed_dim, D head_dim, H hidden_size.
"""

import numpy as np

from ...artifacts.onnx_ops import MICROSOFT
from ...runtime.models.config import VisionConfig
from .graph import Graph
from .linear import Linears
from .rotary import frequencies, rotary_tables

# Qwen2-VL's vision tower fixes both; config.json has no field for them
_THETA, _EPS = 10000.0, 1e-6
# quick_gelu is x * sigmoid(1.702 x)
_QUICK_GELU = 1.702


def add_visual(graph: Graph, linears: Linears, config: VisionConfig) -> None:
    """Inputs: patches uint8 [B, N, patch_dim] in merge-window order, positions [2, B, N] (row and column).
    Output: embeds [B * N / merge**2, H].
    """
    _Visual(graph, linears, config).run()


class _Visual:
    def __init__(self, graph: Graph, linears: Linears, config: VisionConfig) -> None:
        self.graph, self.linears, self.config = graph, linears, config

    def run(self) -> None:
        graph, linears, config = self.graph, self.linears, self.config
        patches = graph.input("patches", "uint8", ["segments", "patches", config.patch_dim])
        positions = graph.input("positions", "int64", [2, "segments", "patches"])
        # a frequency turns by the row's position, then the same ones by the column's
        quarter = frequencies(config.head_dim // 2, _THETA)
        axes = np.zeros((2, config.head_dim // 2), np.float32)
        axes[0, : len(quarter)] = axes[1, len(quarter) :] = quarter
        self.cos, self.sin = rotary_tables(graph, positions, axes, ("segments", "patches"))
        self.by_patch = graph.node(
            "Concat",
            "by_patch",
            graph.node("Shape", "by_patch.segments", patches, end=2),
            graph.constant("any", [-1], np.int64),
            axis=0,
        )
        self.flat = graph.constant("flat", [-1, config.embed_dim], np.int64)
        x = graph.cast("patches.float", patches, "fp32")
        x = graph.node("Reshape", "patches.flat", x, graph.constant("patch", [-1, config.patch_dim], np.int64))
        x = linears.floats(x, "visual.patch_embed", "patch_embed")
        residual = x
        for i in range(config.depth):
            x, residual = self._block(i, x, residual)
        y, _ = linears.add_norm(residual, x, "visual.merger.ln_q", "merger.norm", _EPS, bias=True)
        y = graph.node("Reshape", "merger.merged", y, graph.constant("merged", [-1, config.merged_dim], np.int64))
        y = linears.rows(y, "visual.merger.mlp.0", "merger.fc1")
        # GELU with erf, as the checkpoint was trained
        linears.rows(graph.node("Gelu", "merger.gelu", y), "visual.merger.mlp.2", "embeds")
        graph.output("embeds", "fp32", ["merged_patches", config.hidden_size])

    def _block(self, i: int, x: str, residual: str) -> tuple[str, str]:
        """x is what the block before adds to the residual; returns the same of this one."""
        linears, parameter, name = self.linears, f"visual.blocks.{i}", f"block.{i}"
        norm = (f"{parameter}.norm1", f"{name}.attention_norm", _EPS)
        if i == 0:
            y = linears.norm(x, *norm, bias=True)
        else:
            y, residual = linears.add_norm(residual, x, *norm, bias=True)
        y = linears.rows(y, f"{parameter}.attn.qkv", f"{name}.attention.qkv")
        y = linears.rows(self._attention(f"{name}.attention", y), f"{parameter}.attn.proj", f"{name}.attention.out")
        y, residual = linears.add_norm(residual, y, f"{parameter}.norm2", f"{name}.mlp_norm", _EPS, bias=True)
        y = linears.rows(y, f"{parameter}.mlp.fc1", f"{name}.mlp.fc1")
        y = linears.swish(y, f"{name}.mlp.quick_gelu", _QUICK_GELU)
        return linears.rows(y, f"{parameter}.mlp.fc2", f"{name}.mlp.fc2"), residual

    def _attention(self, name: str, qkv: str) -> str:
        """qkv [B * N, 3 E] to the attention's output before its projection, [B * N, E]."""
        graph, heads = self.graph, self.config.num_heads
        q, k, v = graph.nodes(
            "Split",
            f"{name}.split",
            graph.node("Reshape", f"{name}.by_patch", qkv, self.by_patch),
            outputs=tuple(f"{name}.{each}" for each in "qkv"),
            axis=-1,
            num_outputs=3,
        )
        q, k = (
            graph.node("RotaryEmbedding", f"{name}.rope_{each}", value, self.cos, self.sin, num_heads=heads)
            for each, value in (("q", q), ("k", k))
        )
        scale = self.config.head_dim**-0.5
        if self.linears.form.standard_only:
            y = graph.node("Attention", name, q, k, v, q_num_heads=heads, kv_num_heads=heads, scale=scale)
        else:
            # the standard operator's kernel holds all scores, heads x N x N, at once
            y = graph.node("MultiHeadAttention", name, q, k, v, domain=MICROSOFT, num_heads=heads, scale=scale)
        return graph.node("Reshape", f"{name}.flat", y, self.flat)
