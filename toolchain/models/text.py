"""The language model: prefill of one cache row, and decode of a batch.

Shapes: S prompt tokens, B batch rows, H hidden_size, D head_dim, KV num_kv_heads x D, L cache length, V vocabulary.
The caches are lists of one key and one value tensor a layer, each [B, L, KV], written in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...artifacts.config import TextConfig
from .form import Form
from .layers import ALL_TOKENS, Embedding, Linear, RMSNorm

# FusedInferAttentionScore: sparse_mode 3 aligns the causal triangle with the end of the cache; the operator reads one
# fixed mask of this side instead of a mask of S x length
RIGHT_DOWN_CAUSAL = 3
CAUSAL_MASK_SIDE = 2048


@dataclass(frozen=True)
class Step:
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


class Attention(nn.Module):
    """Grouped-query attention over the cache, which this layer first extends."""

    def __init__(self, config: TextConfig, form: Form) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.q_dim, self.kv_dim = config.hidden_size, config.kv_dim
        self.scale = config.head_dim**-0.5
        self.fused = form.operators == "fused"
        self.qkv_proj = Linear(config.hidden_size, self.q_dim + 2 * self.kv_dim)
        self.o_proj = Linear(self.q_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor], step: Step) -> Tensor:
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

    def attend_fused(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
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

    def attend_recipe(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
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
                next_tokens=ALL_TOKENS,
                input_layout="BSH",
                sparse_mode=10,
                **shared,
            )
        return out


class Mlp(nn.Module):
    """SwiGLU over a fused gate and up projection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.ops.npu.npu_swiglu(self.gate_up_proj(x)))


class Layer(nn.Module):
    """The parts of one decoder layer; `Model.layers_forward` runs them: a norm fuses with the addition before it."""

    def __init__(self, config: TextConfig, form: Form) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, form)
        self.mlp = Mlp(config)


class Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: TextConfig, form: Form) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        # nn.ModuleList does not say what it holds
        self.layers: Sequence[Layer] = nn.ModuleList(Layer(config, form) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def layers_forward(
        self, x: Tensor, caches: list[tuple[Tensor, Tensor]], step: Step, last: Tensor | None = None
    ) -> Tensor:
        """Run all layers over x [B * S, H].

        last [1] is the row whose logits are wanted: the last layer computes everything after its attention, and the
        final norm, for that row only. Without it, for all rows. Returns the normalised hidden state [B * S or 1, H].
        """
        residual = x
        y = self.layers[0].input_layernorm(residual)
        for i, layer in enumerate(self.layers):
            if i > 0:
                y, residual = layer.input_layernorm.add(residual, x)
            attention = layer.self_attn(y, caches[i], step)
            if last is not None and i == len(self.layers) - 1:
                attention = attention.index_select(0, last)
                residual = residual.index_select(0, last)
            y, residual = layer.post_attention_layernorm.add(residual, layer.self_attn.o_proj(attention))
            x = layer.mlp(y)
        y, _ = self.norm.add(residual, x)
        return y
