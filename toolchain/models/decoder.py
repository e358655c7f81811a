"""The language model: prefill of one cache row, and decode of a batch.

Shapes: S prompt tokens, B batch rows, H hidden_size, D head_dim, KV num_kv_heads x D, L cache length, V vocabulary.
The caches are lists of one key and one value tensor a layer, each [B, L, KV], written in place.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...runtime.models.base import GraphOptions
from ...runtime.models.config import TextConfig
from ...runtime.ops.attention import CAUSAL_MASK_SIDE
from .attention import Attended, CachedAttention
from .layers import Constants, Embedding, GatedMlp, Linear, Norm, RMSNorm

# width and eps to a normalisation, width and inner width to what stands behind the attention
NormOf = Callable[[int, float], Norm]
MlpOf = Callable[[int, int], nn.Module]


class Layer(nn.Module):
    """The parts of one layer; `Layers.run` runs them: a norm fuses with the addition before it."""

    def __init__(self, config: TextConfig, options: GraphOptions, norm: NormOf, mlp: MlpOf) -> None:
        super().__init__()
        self.input_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = CachedAttention(config, options)
        self.mlp = mlp(config.hidden_size, config.intermediate_size)


class Layers(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: TextConfig, options: GraphOptions, norm: NormOf, mlp: MlpOf) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        # nn.ModuleList does not say what it holds
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            Layer(config, options, norm, mlp) for _ in range(config.num_layers)
        )
        self.norm = norm(config.hidden_size, config.rms_norm_eps)

    def run(self, x: Tensor, caches: list[tuple[Tensor, Tensor]], step: Attended, last: Tensor | None = None) -> Tensor:
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


class Decoder(nn.Module):
    """Layers between an embedding and logits. Parameter names are those of the family's weights and `constants.*`.

    A family with other layers says so in norm_of and mlp_of.
    """

    norm_of: ClassVar[NormOf] = RMSNorm
    mlp_of: ClassVar[MlpOf] = GatedMlp

    def __init__(self, config: TextConfig, options: GraphOptions, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = Layers(config, options, type(self).norm_of, type(self).mlp_of)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.constants = Constants(tables)
        self.rotary_heads = config.rotary_heads
        self.text_dim = config.head_dim

    def logits(self, y: Tensor) -> Tensor:
        """y [rows, H] to [rows, V]."""
        return torch.ops.npu.npu_linear(y, (self.lm_head or self.model.embed_tokens).weight)

    def token(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [rows, V] to the index of the largest [rows], and what the host reads of it: -1 in rows that hold NaN
        or infinity. The first always is a row of the embedding, so that steps launched ahead stay within it."""
        token = logits.argmax(-1)
        return token, torch.where(torch.isfinite(logits).all(-1), token, -1)

    def rotary(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """cos | sin [S, 2 D] to cos and sin [1, S, heads + 2 kv_heads, D], which leave v as it is."""
        constants = self.constants
        per_head = torch.addcmul(
            constants.passing_heads, angles.view(1, -1, 1, 2 * self.text_dim), constants.turning_heads
        )
        cos, sin = per_head.split([self.text_dim, self.text_dim], -1)
        return cos, sin

    def prefill(
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
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run S new tokens of one row, attending over the cache from its start.

        token_ids int64 [S]; image_embeds [M, H] replace the embeddings at image_index int64 [M, 1];
        positions int64 [3, S] are M-RoPE's temporal, height and width; cache_index int64 [1] is the first cache
        position to write; last int64 [1] is S - 1; kv_lengths is [cache_index + S];
        keys, values: one [1, L, KV] a layer; mask, in the recipe's form only: bool [1, 1, S, L], true where hidden.
        Returns the next token [1], what the host reads of it (see `token`), and the last position's logits [1, V].
        """
        x = torch.ops.npu.npu_scatter_nd_update(self.model.embed_tokens(token_ids), image_index, image_embeds)
        # each rotary column belongs to one of the three axes: mask the other two away and add
        angles = (nn.functional.embedding(positions, self.constants.text_rope) * self.constants.text_rope_axes).sum(0)
        mask = self.constants.causal_mask if mask is None else mask
        step = Attended(*self.rotary(angles), cache_index, kv_lengths, mask)
        y = self.model.run(x, list(zip(keys, values, strict=True)), step, last)
        logits = self.logits(y)
        return (*self.token(logits), logits)

    def decode(
        self,
        token_ids: Tensor,
        cache_index: Tensor,
        rope_rows: Tensor,
        kv_lengths: list[int],
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Run one token of every row.

        token_ids, cache_index int64 [B]: the tokens, and the cache positions to write. rope_rows int64 [B, heads +
        2 kv_heads]: the row of text_rope that turns each head: the rotary position (after the prompt the three M-RoPE
        axes agree) for q and k, the last row for v. kv_lengths are cache_index + 1, on the host; keys, values: one
        [B, L, KV] a layer.
        Returns the next tokens [B], what the host reads of them (see `token`), logits [B, V], and the next step's
        cache_index and rope_rows.
        """
        constants = self.constants
        angles = nn.functional.embedding(rope_rows, constants.text_rope)
        angles = angles.view(-1, 1, self.rotary_heads, 2 * self.text_dim)
        cos, sin = angles.split([self.text_dim, self.text_dim], -1)
        step = Attended(cos, sin, cache_index, kv_lengths, None)
        y = self.model.run(self.model.embed_tokens(token_ids), list(zip(keys, values, strict=True)), step)
        logits = self.logits(y)
        return (*self.token(logits), logits, cache_index + 1, rope_rows + constants.next_rope_rows)


def angles(length: int, dim: int, theta: float) -> Tensor:
    """Rotary angles [length, dim / 2], in the fp32 arithmetic of transformers' rotary embeddings."""
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return torch.outer(torch.arange(length, dtype=torch.float32), inverse)


def cos_sin(angles: Tensor, repeats: int) -> Tensor:
    full = angles.repeat(1, repeats)
    return torch.cat([full.cos(), full.sin()], 1)


def tables(text: TextConfig, options: GraphOptions) -> dict[str, Tensor]:
    """The decoder's constants, by name.

    text_rope [max_length + 1, 2 D]: cos | sin by position, laid out for the half-split rotation; its last row is cos 1
    and sin 0, and turns nothing. text_rope_axes [3, 1, 2 D] holds 1 in the columns that turn by that axis' position.
    turning_heads [1, 1, heads, 1]: 1 for the heads of q and k, 0 for those of v; passing_heads [1, 1, heads, 2 D]: what
    v gets instead of angles. next_rope_rows [1, heads]: what a step adds to decode's rope_rows.
    """
    section = torch.repeat_interleave(torch.arange(3), torch.tensor(text.mrope_section))
    axis = section.repeat(4)  # two halves of the head, for cos and for sin
    turning = torch.ones(text.rotary_heads)
    turning[-text.num_kv_heads :] = 0
    # the angle 0
    still = cos_sin(torch.zeros(1, text.head_dim // 2), 2)
    made = {
        "text_rope": torch.cat([cos_sin(angles(options.max_length, text.head_dim, text.rope_theta), 2), still]),
        "text_rope_axes": (axis == torch.arange(3)[:, None]).float()[:, None],
        "turning_heads": turning[None, None, :, None],
        "passing_heads": (1 - turning[None, None, :, None]) * still,
        "next_rope_rows": turning[None].to(torch.int64),
    }
    if options.operators == "fused":
        # true hides: FusedInferAttentionScore takes the strictly upper triangle
        made["causal_mask"] = torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool).triu(1)
    return made
