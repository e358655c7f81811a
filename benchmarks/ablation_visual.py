"""Stand-ins for the vision tower's modules: one optimisation undone, or another one tried."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from ablation_text import rotate_half
from torch import Tensor

from qwen2vl_tc.artifacts.config import ModelConfig, VisionConfig
from qwen2vl_tc.toolchain.graphs import signatures, visual
from qwen2vl_tc.toolchain.graphs.form import Form
from qwen2vl_tc.toolchain.graphs.layers import Linear, parameter
from qwen2vl_tc.toolchain.graphs.signatures import Qwen2VL, Signature


class _VisualAttention(visual.Attention):
    def rotated(self, x: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [N, heads, D], with q and k rotated."""
        raise NotImplementedError

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned: Tensor = torch.ops.npu.npu_rotary_mul(x.view(1, -1, self.heads, self.head_dim), cos, sin)
        return turned.view(-1, self.heads, self.head_dim)

    def forward(self, x: Tensor, cos: Any, sin: Any, segments: Any) -> Tensor:
        q, k, v = self.rotated(x, cos, sin)
        out = torch.ops.npu.npu_fused_infer_attention_score(
            q,
            k,
            v,
            actual_seq_lengths=segments,
            actual_seq_lengths_kv=segments,
            num_heads=self.heads,
            scale=self.scale,
            input_layout="TND",
        )[0]
        return self.proj(out.view(-1, self.width))


class VisualJointRotation(_VisualAttention):
    """q and k rotated together, between a split before and a split after."""

    def rotated(self, x: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor, Tensor]:
        qk, v = self.qkv(x).split([2 * self.width, self.width], -1)
        qk = torch.ops.npu.npu_rotary_mul(qk.view(1, -1, 2 * self.heads, self.head_dim), cos, sin)
        q, k = qk.view(-1, 2 * self.heads, self.head_dim).split([self.heads, self.heads], 1)
        return q, k, v.view(-1, self.heads, self.head_dim)


class VisualThreeProducts(_VisualAttention):
    """q, k and v from a product each."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        del self.qkv
        self.q, self.k, self.v = (Linear(self.width, self.width) for _ in range(3))

    def rotated(self, x: Tensor, cos: Any, sin: Any) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.turn(self.q(x), cos, sin),
            self.turn(self.k(x), cos, sin),
            self.v(x).view(-1, self.heads, self.head_dim),
        )


def quick_gelu(self: visual.Mlp, x: Tensor) -> Tensor:
    y = self.fc1(x)
    return self.fc2(y * torch.sigmoid(1.702 * y))


class VisualPlainRotation(visual.Attention):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, segments: Any) -> Tensor:
        q, k, v = self.qkv(x).split([self.width] * 3, -1)
        q, k = (rotate_half(t.view(1, -1, self.heads, self.head_dim), cos, sin) for t in (q, k))
        return self.proj(self.attend_packed(q, k, v, segments))


class PerLayerRopeVisualAttention(visual.Attention):
    def forward(self, x: Tensor, cos: Any, sin: Any, segments: Any) -> Tensor:
        return super().forward(x, *cos(), segments)


class PerLayerRopeVisual(visual.Visual):
    def forward(self, patches: Tensor, positions: Tensor, segments: Any, rope: Tensor, rope_axes: Tensor) -> Tensor:
        def made() -> tuple[Tensor, Tensor]:
            angles = (F.embedding(positions, rope) * rope_axes).sum(0)
            cos, sin = angles.view(1, -1, 1, 2 * self.head_dim).split([self.head_dim, self.head_dim], -1)
            return cos, sin

        x = residual = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        y = self.blocks[0].norm1(residual)
        for i, block in enumerate(self.blocks):
            if i > 0:
                y, residual = block.norm1.add(residual, x)
            y, residual = block.norm2.add(residual, block.attn(y, made, None, segments))
            x = block.mlp(y)
        return self.merger(residual, x)


def plain_masked(self: visual.Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """transformers' eager attention in the vision tower: two products and a softmax in fp32 over a dense mask."""
    q, k, v = (x.view(-1, self.heads, self.head_dim).transpose(0, 1) for x in (q, k, v))
    scores = torch.matmul(q, k.transpose(1, 2)) * self.scale
    scores = scores.masked_fill(mask.squeeze(0), torch.finfo(q.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(weights, v).transpose(0, 1).reshape(-1, self.width)


class PixelModel(Qwen2VL):
    """Rescaling and normalisation of the pixels in the graph, not in the weights."""

    def __init__(self, config: ModelConfig, max_length: int, form: Form) -> None:
        super().__init__(config, max_length, form)
        self.pixel_scale = parameter(1, config.vision.patch_dim)
        self.pixel_mean = parameter(1, config.vision.patch_dim)

    def encode(self, patches: Tensor, positions: Tensor, segment_ends: list[int]) -> Tensor:
        pixels = patches.to(self.pixel_scale.dtype) * self.pixel_scale + self.pixel_mean
        return super().encode(pixels, positions, segment_ends)


def host_normalised(dtype: torch.dtype) -> Callable[[Qwen2VL, Signature], Signature]:
    def change(model: Any, signature: Signature) -> Signature:
        patches = signature.arguments["patches"]
        floats = signatures._example("npu", *patches.shape, dtype=dtype, dynamic=(0,))
        return replace(signature, arguments={**signature.arguments, "patches": floats})

    return change


class VisualOneRotation(_VisualAttention):
    """One rotation over q, k and v, as in the language model: cos and sin are then [1, N, 3 heads, D]."""

    def forward(self, x: Tensor, cos: Any, sin: Any, segments: Any) -> Tensor:
        qkv = self.qkv(x).view(1, -1, 3 * self.heads, self.head_dim)
        qkv = torch.ops.npu.npu_rotary_mul(qkv, cos, sin).view(-1, 3 * self.heads, self.head_dim)
        q, k, v = qkv.split([self.heads] * 3, 1)
        out = torch.ops.npu.npu_fused_infer_attention_score(
            q,
            k,
            v,
            actual_seq_lengths=segments,
            actual_seq_lengths_kv=segments,
            num_heads=self.heads,
            scale=self.scale,
            input_layout="TND",
        )[0]
        return self.proj(out.view(-1, self.width))


class WideRopeVisual(visual.Visual):
    """Widens cos and sin to 3 x heads once, 1 and 0 for v."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        self.turning = parameter(1, 1, 3 * config.num_heads, 1)
        self.passing = parameter(1, 1, 3 * config.num_heads, 1)

    def forward(self, patches: Tensor, positions: Tensor, segments: Any, rope: Tensor, rope_axes: Tensor) -> Tensor:
        angles = (F.embedding(positions, rope) * rope_axes).sum(0)
        cos, sin = angles.view(1, -1, 1, 2 * self.head_dim).split([self.head_dim, self.head_dim], -1)
        cos, sin = cos * self.turning + self.passing, sin * self.turning
        x = residual = self.patch_embed(patches.to(self.patch_embed.weight.dtype))
        y = self.blocks[0].norm1(residual)
        for i, block in enumerate(self.blocks):
            if i > 0:
                y, residual = block.norm1.add(residual, x)
            y, residual = block.norm2.add(residual, block.attn(y, cos, sin, segments))
            x = block.mlp(y)
        return self.merger(residual, x)


class FusedFfn(visual.Mlp):
    """FFN: both products and the activation in one operator; weights stored [inputs, outputs], biases fp32."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(config)
        del self.fc1, self.fc2
        self.first, self.second = (
            parameter(config.embed_dim, config.mlp_dim),
            parameter(config.mlp_dim, config.embed_dim),
        )
        self.first_bias = parameter(config.mlp_dim, dtype=torch.float32)
        self.second_bias = parameter(config.embed_dim, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.npu.npu_ffn(
            x, self.first, self.second, "fastgelu", bias1=self.first_bias, bias2=self.second_bias
        )
        return out
