"""Stand-ins for the language model's modules and the shared layers: one optimisation undone, or another one tried."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2vl_tc.artifacts.config import TextConfig
from qwen2vl_tc.toolchain.graphs import signatures, text
from qwen2vl_tc.toolchain.graphs.form import Form
from qwen2vl_tc.toolchain.graphs.layers import LayerNorm, Linear, RMSNorm
from qwen2vl_tc.toolchain.graphs.signatures import Qwen2VL, Signature

PREFILL = "prefill"


def narrow_rotary(self: Qwen2VL, angles: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, S, 1, D], the same for every head: for a rotation of q and k alone."""
    cos, sin = angles.view(batch, -1, 1, 2 * self.text_dim).split([self.text_dim, self.text_dim], -1)
    return cos, sin


class _Attention(text.Attention):
    """`forward` in two parts: what comes before the cache is what variants change."""

    def rotated(self, x: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, S, H], k and v [B, S, KV], with q and k rotated."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Any) -> Tensor:
        q, k, v = self.rotated(x, step)
        keys, values = cache
        torch.ops.npu.scatter_update_(keys, step.cache_index, k, 1)
        torch.ops.npu.scatter_update_(values, step.cache_index, v, 1)
        attend = self.attend_fused if self.fused else self.attend_recipe
        return attend(q, keys, values, step).view(-1, self.q_dim)

    def turn(self, x: Tensor, batch: int, heads: int, step: Any) -> Tensor:
        x = x.view(batch, -1, heads, self.head_dim)
        turned: Tensor = torch.ops.npu.npu_rotary_mul(x, step.cos, step.sin)
        return turned.view(batch, -1, heads * self.head_dim)


class SeparateRotations(_Attention):
    """One product for q, k and v, a split, then q and k each rotated alone."""

    def rotated(self, x: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = step.cache_index.shape[0]
        q, k, v = self.qkv_proj(x).split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        q, k = self.turn(q, batch, self.heads, step), self.turn(k, batch, self.kv_heads, step)
        return q, k, v.view(batch, -1, self.kv_dim)


class ThreeProducts(_Attention):
    """q, k and v from a product each; nothing to split, and q and k are rotated alone."""

    def __init__(self, config: TextConfig, form: Form) -> None:
        super().__init__(config, form)
        del self.qkv_proj
        self.q_proj = Linear(config.hidden_size, self.q_dim)
        self.k_proj = Linear(config.hidden_size, self.kv_dim)
        self.v_proj = Linear(config.hidden_size, self.kv_dim)

    def rotated(self, x: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = step.cache_index.shape[0]
        q = self.turn(self.q_proj(x), batch, self.heads, step)
        k = self.turn(self.k_proj(x), batch, self.kv_heads, step)
        return q, k, self.v_proj(x).view(batch, -1, self.kv_dim)


class TwoProductsMlp(text.Mlp):
    """gate and up from a product each, silu and a multiplication."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__(config)
        del self.gate_up_proj
        self.gate_proj, self.up_proj = (
            Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def silu_mul(self: text.Mlp, x: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(x).chunk(2, -1)
    return self.down_proj(F.silu(gate) * up)


def plain_linear(self: Linear, x: Tensor) -> Tensor:
    return F.linear(x, self.weight, self.bias if self.bias is None else self.bias.to(x.dtype))


def plain_logits(self: Qwen2VL, y: Tensor) -> Tensor:
    return F.linear(y, (self.lm_head or self.model.embed_tokens).weight)


def plain_rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
    return self.weight * wide.to(x.dtype)


def plain_rms_add(self: RMSNorm, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return plain_rms_norm(self, total), total


def add_then_norm(self: RMSNorm | LayerNorm, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    total = residual + x
    return self(total), total


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What npu_rotary_mul computes, as transformers writes it."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class PlainRotation(text.Attention):
    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Any) -> Tensor:
        batch = step.cache_index.shape[0]
        qkv = self.qkv_proj(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = rotate_half(qkv, step.cos, step.sin).view(batch, -1, self.q_dim + 2 * self.kv_dim)
        q, k, v = qkv.split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        keys, values = cache
        torch.ops.npu.scatter_update_(keys, step.cache_index, k, 1)
        torch.ops.npu.scatter_update_(values, step.cache_index, v, 1)
        return self.attend_fused(q, keys, values, step).view(-1, self.q_dim)


class PerLayerRope(text.Attention):
    """cos and sin made in every layer: `step.cos` is the function that makes both."""

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Any) -> Tensor:
        cos, sin = step.cos()
        return super().forward(x, cache, replace(step, cos=cos, sin=sin))


class PerLayerRopeModel(Qwen2VL):
    """Hands the layers a function in place of cos and sin."""

    def prefill(  # type: ignore[override]
        self,
        token_ids: Tensor,
        image_embeds: Tensor,
        image_index: Tensor,
        positions: Tensor,
        cache_index: Tensor,
        last: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        def rope() -> tuple[Tensor, Tensor]:
            picked = F.embedding(positions, self.constants.text_rope) * self.constants.text_rope_axes
            return self.rotary(picked.sum(0), 1)

        x = torch.ops.npu.npu_scatter_nd_update(self.model.embed_tokens(token_ids), image_index, image_embeds)
        step = text.Step(rope, None, cache_index, kv_lengths, self.constants.causal_mask)  # type: ignore[arg-type]
        logits = self.logits(self.model.layers_forward(x, list(zip(keys, values, strict=True)), step, last))
        return logits.argmax(-1), logits

    def decode(
        self,
        token_ids: Tensor,
        cache_index: Tensor,
        positions: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def rope() -> tuple[Tensor, Tensor]:
            return self.rotary(F.embedding(positions, self.constants.text_rope), token_ids.shape[0])

        step = text.Step(rope, None, cache_index, kv_lengths, None)  # type: ignore[arg-type]
        x = self.model.embed_tokens(token_ids)
        logits = self.logits(self.model.layers_forward(x, list(zip(keys, values, strict=True)), step))
        return logits.argmax(-1), logits, cache_index + 1, positions + 1


def all_rows(
    self: text.Model, x: Tensor, caches: list[tuple[Tensor, Tensor]], step: Any, last: Tensor | None = None
) -> Tensor:
    """`Model.layers_forward` that computes every row in the last layer too."""
    y = _layers_forward(self, x, caches, step)
    return y if last is None else y.index_select(0, last)


_layers_forward = text.Model.layers_forward


class AllLogits(Qwen2VL):
    """lm_head over all positions, as transformers 4.47 did; the last row is taken of the logits."""

    def prefill(  # type: ignore[override]
        self,
        token_ids: Tensor,
        image_embeds: Tensor,
        image_index: Tensor,
        positions: Tensor,
        cache_index: Tensor,
        last: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        x = torch.ops.npu.npu_scatter_nd_update(self.model.embed_tokens(token_ids), image_index, image_embeds)
        angles = (F.embedding(positions, self.constants.text_rope) * self.constants.text_rope_axes).sum(0)
        step = text.Step(*self.rotary(angles, 1), cache_index, kv_lengths, self.constants.causal_mask)
        y = self.model.layers_forward(x, list(zip(keys, values, strict=True)), step)
        logits = self.logits(y).index_select(0, last)
        return logits.argmax(-1), logits


class HostLoopModel(Qwen2VL):
    """Decode of the layers alone: embedding, cos and sin, argmax and the advance of positions are left to the host."""

    def decode_layers(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache_index: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> Tensor:
        step = text.Step(cos, sin, cache_index, kv_lengths, None)
        return self.logits(self.model.layers_forward(x, list(zip(keys, values, strict=True)), step))

    def before(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the host then runs eagerly before every step."""
        angles = F.embedding(positions, self.constants.text_rope)
        return (self.model.embed_tokens(token_ids), *self.rotary(angles, token_ids.shape[0]))

    def after(self, logits: Tensor, cache_index: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the host then runs eagerly after every step."""
        return logits.argmax(-1), cache_index + 1, positions + 1


def host_loop(model: Any, signature: Signature) -> Signature:
    given = dict(signature.arguments)
    config = model.model.layers[0].self_attn
    dtype = model.model.embed_tokens.weight.dtype
    heads = config.heads + 2 * config.kv_heads
    shapes = {"x": (1, config.q_dim), "cos": (1, 1, heads, config.head_dim), "sin": (1, 1, heads, config.head_dim)}
    made = {name: signatures._example("npu", *shape, dtype=dtype) for name, shape in shapes.items()}
    kept = {name: given[name] for name in ("cache_index", "kv_lengths", "keys", "values")}
    outputs = {"logits": (1, model.model.embed_tokens.weight.shape[0])}
    return replace(signature, method=model.decode_layers, arguments={**made, **kept}, outputs=outputs)


class ConcatAttention(text.Attention):
    """The cache grows by concatenation; every layer hands the longer one back."""

    def forward(self, x: Tensor, cache: Any, step: Any) -> Tensor:
        batch = step.cache_index.shape[0]
        qkv = self.qkv_proj(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = torch.ops.npu.npu_rotary_mul(qkv, step.cos, step.sin).view(batch, -1, self.q_dim + 2 * self.kv_dim)
        q, k, v = qkv.split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        keys, values, grown = cache
        keys, values = torch.cat([keys, k], 1), torch.cat([values, v], 1)
        grown.append((keys, values))
        return self.attend(q, keys, values, step).reshape(-1, self.q_dim)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Any) -> Tensor:
        return self.attend_fused(q, keys, values, step)


class PlainAttention(ConcatAttention):
    """transformers' eager attention over such a cache: repeated key-value heads, two products, a softmax in fp32."""

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Any) -> Tensor:
        batch, groups = q.shape[0], self.heads // self.kv_heads

        def repeated(x: Tensor) -> Tensor:
            length = x.shape[1]
            x = x.view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
            x = x[:, :, None].expand(-1, -1, groups, -1, -1)
            return x.reshape(batch, self.heads, length, self.head_dim)

        rows = q.view(batch, -1, self.heads, self.head_dim).transpose(1, 2)
        scores = torch.matmul(rows, repeated(keys).transpose(2, 3)) * self.scale
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(weights, repeated(values)).transpose(1, 2)


class ConcatModel(Qwen2VL):
    def decode(  # type: ignore[override]
        self,
        token_ids: Tensor,
        cache_index: Tensor,
        positions: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        angles = F.embedding(positions, self.constants.text_rope)
        step = text.Step(*self.rotary(angles, token_ids.shape[0]), cache_index, kv_lengths, None)
        grown: list[tuple[Tensor, Tensor]] = []
        caches: Any = [(k, v, grown) for k, v in zip(keys, values, strict=True)]
        logits = self.logits(self.model.layers_forward(self.model.embed_tokens(token_ids), caches, step))
        flat = [tensor for pair in grown for tensor in pair]
        return logits.argmax(-1), logits, cache_index + 1, positions + 1, *flat


def growing_cache(model: Any, signature: Signature) -> Signature:
    """Caches whose length is dynamic, and the longer ones among the outputs."""
    given = dict(signature.arguments)
    for side in ("keys", "values"):
        kv_dim, dtype = given[side][0].shape[2], given[side][0].dtype
        given[side] = [signatures._example("npu", 1, 371, kv_dim, dtype=dtype, dynamic=(1,)) for _ in given[side]]
    outputs = {**dict.fromkeys(signature.outputs, ()), **{f"cache_{i}": () for i in range(2 * len(given["keys"]))}}
    return replace(signature, arguments=given, outputs=outputs)


class Prefetching(text.Attention):
    """Fetches o_proj's weight into the cache on the chip while attention, which reads no weight, runs."""

    def attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, step: Any) -> Tensor:
        weight = self.o_proj.weight
        torch.ops.npu.npu_prefetch(weight, q, weight.numel() * weight.element_size())
        return super().attend_fused(q, keys, values, step)


class ScatterPair(_Attention):
    """One operator writes K and V into caches [blocks, 128, kv_heads, D], which attention reads as [1, L, KV]."""

    BLOCK = 128

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Any) -> Tensor:
        batch = step.cos.shape[0]
        qkv = self.qkv_proj(x).view(batch, -1, self.heads + 2 * self.kv_heads, self.head_dim)
        qkv = torch.ops.npu.npu_rotary_mul(qkv, step.cos, step.sin).view(batch, -1, self.q_dim + 2 * self.kv_dim)
        q, k, v = qkv.split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        k, v = (t.view(-1, self.kv_heads, self.head_dim) for t in (k, v))
        keys, values = cache
        torch.ops.npu.npu_scatter_pa_kv_cache(k, v, keys, values, step.cache_index, cache_mode="Norm")
        keys, values = (t.view(batch, -1, self.kv_dim) for t in (keys, values))
        return self.attend_fused(q, keys, values, step).view(-1, self.q_dim)


def blocked_cache(model: Any, signature: Signature) -> Signature:
    """The same bytes as [1, L, KV], declared as the blocks that ScatterPaKvCache wants."""
    given = dict(signature.arguments)
    attention = model.model.layers[0].self_attn
    for side in ("keys", "values"):
        first = given[side][0]
        shape = (first.shape[1] // ScatterPair.BLOCK, ScatterPair.BLOCK, attention.kv_heads, attention.head_dim)
        given[side] = [signatures._example("npu", *shape, dtype=first.dtype) for _ in given[side]]
    if signature.name == PREFILL:
        # a slot for every token, where Scatter takes the first one
        slots = given["token_ids"].shape[0]
        given["cache_index"] = signatures._example("npu", slots, dtype=torch.int64, dynamic=(0,))
    return replace(signature, arguments=given)


class PairRotation(_Attention):
    """ApplyRotaryPosEmb: one operator that rotates q and k in place, after a split."""

    def rotated(self, x: Tensor, step: Any) -> tuple[Tensor, Tensor, Tensor]:
        batch = step.cache_index.shape[0]
        q, k, v = self.qkv_proj(x).split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        q, k = (t.view(batch, -1, n, self.head_dim) for t, n in ((q, self.heads), (k, self.kv_heads)))
        q, k = torch.ops.npu.npu_apply_rotary_pos_emb(q, k, step.cos, step.sin, "BSND")
        return (*(t.view(batch, -1, n) for t, n in ((q, self.q_dim), (k, self.kv_dim))), v.view(batch, -1, self.kv_dim))


class AttentionV2(text.Attention):
    def attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, step: Any) -> Tensor:
        out: Tensor = torch.ops.npu.npu_fused_infer_attention_score_v2(
            q,
            keys,
            values,
            atten_mask=step.mask,
            actual_seq_kvlen=step.kv_lengths,
            num_query_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            softmax_scale=self.scale,
            input_layout="BSH",
            sparse_mode=0 if step.mask is None else text.RIGHT_DOWN_CAUSAL,
        )[0]
        return out
