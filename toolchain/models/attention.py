"""Attention over a KV cache, and within segments of patches.

Shapes: S tokens, B batch rows, D head_dim, KV num_kv_heads x D, L cache length; N patches, E the tower's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...runtime.models.base import GraphOptions
from ...runtime.models.config import TextConfig, VisionConfig
from ...runtime.ops.attention import RIGHT_DOWN_CAUSAL, UNLIMITED
from .layers import Linear


@dataclass(frozen=True)
class Attended:
    """What all layers of one step share.

    cos, sin [B, S, heads + 2 kv_heads, D]: the rotation of q and k; 1 and 0 for v, which passes through.
    cache_index int64 [B]: first cache position to write. kv_lengths: valid cache positions of every row, afterwards.
    mask: None in decode; in prefill the fixed causal mask of the fused form, or the recipe's [1, 1, S, L].
    """

    cos: Tensor
    sin: Tensor
    cache_index: Tensor
    kv_lengths: list[int]
    mask: Tensor | None


class CachedAttention(nn.Module):
    """Grouped-query attention over the cache, which this layer first extends."""

    def __init__(self, config: TextConfig, options: GraphOptions) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_dim, self.kv_dim = config.hidden_size, config.kv_dim
        self.scale = config.head_dim**-0.5
        self.fused = options.operators == "fused"
        self.qkv_proj = Linear(config.hidden_size, self.q_dim + 2 * self.kv_dim)
        self.o_proj = Linear(self.q_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Attended) -> Tensor:
        """x [B * S, H] to the attention's output before o_proj, [B * S, H]."""
        batch = step.cache_index.shape[0]
        # One rotation over q, k and v together, and one split after it: rotating q and k alone would take a split
        # before and another one after.
        qkv = self.qkv_proj(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = torch.ops.npu.npu_rotary_mul(qkv, step.cos, step.sin).view(batch, -1, self.q_dim + 2 * self.kv_dim)
        q, k, v = qkv.split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        keys, values = cache
        torch.ops.npu.scatter_update_(keys, step.cache_index, k, 1)
        torch.ops.npu.scatter_update_(values, step.cache_index, v, 1)
        attend = self.attend_fused if self.fused else self.attend_recipe
        return attend(q, keys, values, step).view(-1, self.q_dim)

    def attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, step: Attended) -> Tensor:
        """One operator for prefill and decode; no mask but the fixed one, cache read up to its valid length."""
        out: Tensor = torch.ops.npu.npu_fused_infer_attention_score(
            q,
            keys,
            values,
            atten_mask=step.mask,
            actual_seq_lengths_kv=step.kv_lengths,
            num_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            scale=self.scale,
            input_layout="BSH",
            sparse_mode=0 if step.mask is None else RIGHT_DOWN_CAUSAL,
        )[0]
        return out

    def attend_recipe(self, q: Tensor, keys: Tensor, values: Tensor, step: Attended) -> Tensor:
        """The recipe's pair: PromptFlashAttention over a dense mask, IncreFlashAttention by lengths."""
        shared = {"num_heads": self.heads, "num_key_value_heads": self.kv_heads, "scale_value": self.scale}
        if step.mask is None:
            out: Tensor = torch.ops.npu.npu_incre_flash_attention(
                # inner_precise 0 is the exact mode; the operator's default trades precision for speed in fp16
                q,
                keys,
                values,
                actual_seq_lengths=step.kv_lengths,
                input_layout="BSH",
                inner_precise=0,
                **shared,
            )
        else:
            # sparse_mode 10 is 0 in the exact mode: in fp16 the operator trades precision for speed by default, too
            out = torch.ops.npu.npu_prompt_flash_attention(
                q,
                keys,
                values,
                atten_mask=step.mask,
                next_tokens=UNLIMITED,
                input_layout="BSH",
                sparse_mode=10,
                **shared,
            )
        return out


@dataclass(frozen=True)
class Segments:
    """How patches fall into segments.

    batch: (F, S), rows and patches in each, padding included, with `lengths` the true ones; or None, for segments
    packed end to end with `lengths` their cumulative ends (HF's cu_seqlens without the leading 0).
    keys: where padding stands among a segment's patches, which of all patches are its keys, [F, longest], the first
    `lengths` of each row; all its patches are queries.
    """

    batch: tuple[int, int] | None
    lengths: list[int]
    keys: Tensor | None = None


class SegmentAttention(nn.Module):
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
        if segments.keys is None:
            k, v = k.view(shape), v.view(shape)
        else:
            rows = segments.keys.view(-1)
            k, v = (t.view(-1, self.width).index_select(0, rows).view(*segments.keys.shape, -1) for t in (k, v))
        out = torch.ops.npu.npu_fused_infer_attention_score(
            q.view(shape),
            k,
            v,
            # of the query, too: what lies behind a row's length costs nothing and comes out as zeros
            actual_seq_lengths=segments.lengths if segments.keys is None else None,
            actual_seq_lengths_kv=segments.lengths,
            num_heads=self.heads,
            # as many as heads, and written all the same: CANN's tiling of TND divides by the attribute
            num_key_value_heads=self.heads,
            scale=self.scale,
            input_layout="BSH" if segments.batch else "TND",
        )[0]
        return self.proj(out.view(-1, self.width))
