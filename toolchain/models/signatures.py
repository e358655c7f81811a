"""What is traced: one module with the parameters, and the methods encode, prefill and decode with their inputs.

Every run-time input of a method is an argument; everything else is a parameter or a constant and is frozen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...artifacts.config import ModelConfig
from .form import Form
from .layers import Linear, parameter
from .text import CAUSAL_MASK_SIDE, Model, Step
from .visual import Segments, Visual

# Longest side of a picture in patches. The processor's limits (max_pixels 12,845,056, aspect ratio 200) allow 3,620.
MAX_VISION_SIDE = 4096


def rotary_heads(config: ModelConfig) -> int:
    """The heads that one rotation takes: those of q, of k, and of v, which passes through."""
    return config.text.num_heads + 2 * config.text.num_kv_heads


class Constants(nn.Module):
    """Tables that the graphs read and no checkpoint holds; `toolchain.graphs.constants` computes the values."""

    def __init__(self, config: ModelConfig, max_length: int, form: Form) -> None:
        super().__init__()
        text_dim, vision_dim = config.text.head_dim, config.vision.head_dim
        # the last row turns nothing
        self.text_rope = parameter(max_length + 1, 2 * text_dim)
        self.text_rope_axes = parameter(3, 1, 2 * text_dim)
        self.vision_rope = parameter(MAX_VISION_SIDE, 2 * vision_dim)
        self.vision_rope_axes = parameter(2, 1, 2 * vision_dim)
        heads = rotary_heads(config)
        # 1 for the heads of q and k, 0 for those of v; and what v gets instead of angles: cos 1, sin 0
        self.turning_heads = parameter(1, 1, heads, 1)
        self.passing_heads = parameter(1, 1, heads, 2 * text_dim)
        # what a step adds to decode's rope_rows
        self.next_rope_rows = parameter(1, heads, dtype=torch.int64)
        if form.operators == "fused":
            self.causal_mask = parameter(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool)


class Qwen2VL(nn.Module):
    """The whole model. Parameter names are those of `artifacts.parameters` and `constants.*`."""

    def __init__(self, config: ModelConfig, max_length: int, form: Form) -> None:
        super().__init__()
        self.form = form
        self.visual = Visual(config.vision)
        self.model = Model(config.text, form)
        self.lm_head = None
        if not config.text.tie_word_embeddings:
            self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size, bias=False)
        self.constants = Constants(config, max_length, form)
        self.rotary_heads = rotary_heads(config)
        self.text_dim = config.text.head_dim

    def methods(self) -> dict[str, Callable[..., Any]]:
        """What is traced, or run: visual, prefill and decode."""
        encode = self.encode if self.form.visual_attention == "segments" else self.encode_packed
        return {"visual": encode, "prefill": self.prefill, "decode": self.decode}

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

    def encode(self, patches: Tensor, positions: Tensor, segment_lengths: list[int]) -> Tensor:
        """patches uint8 [F, S, patch_dim], positions int64 [2, F, S]: F segments, each padded to S patches, with
        segment_lengths [F] the true ones; to embeddings [F * S / merge**2, H], padding included."""
        flat = patches.view(-1, patches.shape[-1])
        segments = Segments((patches.shape[0], patches.shape[1]), segment_lengths)
        return self.visual(flat, positions.view(2, -1), segments, *self._vision_tables())

    def encode_packed(self, patches: Tensor, positions: Tensor, segment_ends: list[int]) -> Tensor:
        """patches uint8 [N, patch_dim], positions int64 [2, N], segment_ends: to embeddings [N / merge**2, H]."""
        return self.visual(patches, positions, Segments(None, segment_ends), *self._vision_tables())

    def _vision_tables(self) -> tuple[Tensor, Tensor]:
        return self.constants.vision_rope, self.constants.vision_rope_axes

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
        step = Step(*self.rotary(angles), cache_index, kv_lengths, mask)
        y = self.model.layers_forward(x, list(zip(keys, values, strict=True)), step, last)
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
        step = Step(cos, sin, cache_index, kv_lengths, None)
        y = self.model.layers_forward(self.model.embed_tokens(token_ids), list(zip(keys, values, strict=True)), step)
        logits = self.logits(y)
        return (*self.token(logits), logits, cache_index + 1, rope_rows + constants.next_rope_rows)


def empty_model(config: ModelConfig, max_length: int, form: Form, dtype: torch.dtype) -> Qwen2VL:
    """The model without memory: its parameters are on torch's meta device."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return Qwen2VL(config, max_length, form).eval()
    finally:
        torch.set_default_dtype(default)


@dataclass(frozen=True)
class Signature:
    """One graph to trace: its name, the method, example arguments, and the outputs' shapes by name (-1 is dynamic)."""

    name: str
    method: Callable[..., Any]
    arguments: dict[str, Any]
    outputs: dict[str, tuple[int, ...]]


CACHES = frozenset({"keys", "values"})


def _example(device: str, *shape: int, dtype: torch.dtype, dynamic: tuple[int, ...] = ()) -> Tensor:
    """An argument on the device whose sizes are fixed but for the dimensions listed in `dynamic`."""
    tensor = torch.empty(*shape, dtype=dtype, device=device)
    for dimension in range(len(shape)):
        if dimension not in dynamic:
            torch._dynamo.mark_static(tensor, dimension)
    return tensor


def signatures(
    model: Qwen2VL, config: ModelConfig, dtype: torch.dtype, max_length: int, batches: tuple[int, ...], device: str
) -> Iterator[Signature]:
    """The graphs of one artifact: visual, prefill, and decode_b<rows> for every batch size.

    The example sizes are GE's hint for its first tiling; any distinct numbers above 1 trace the same graph.
    """
    layers, hidden, kv_dim = config.text.num_layers, config.text.hidden_size, config.text.kv_dim
    merge = config.vision.spatial_merge_size**2
    segments, longest, merged, tokens = 3, 116 * merge, 342, 367

    def caches(batch: int) -> list[Tensor]:
        return [_example(device, batch, max_length, kv_dim, dtype=dtype) for _ in range(layers)]

    methods = model.methods()
    if model.form.visual_attention == "segments":
        visual: dict[str, Any] = {
            "patches": _example(device, segments, longest, config.vision.patch_dim, dtype=torch.uint8, dynamic=(0, 1)),
            "positions": _example(device, 2, segments, longest, dtype=torch.int64, dynamic=(1, 2)),
            "segment_lengths": [longest, longest - merge, longest - 2 * merge],
        }
    else:
        patches = merged * merge
        visual = {
            "patches": _example(device, patches, config.vision.patch_dim, dtype=torch.uint8, dynamic=(0,)),
            "positions": _example(device, 2, patches, dtype=torch.int64, dynamic=(1,)),
            "segment_ends": [171 * merge, patches - 2],
        }
    yield Signature("visual", methods["visual"], visual, {"embeds": (-1, hidden)})
    dense: dict[str, Any] = {}
    if model.form.operators == "recipe":
        dense["mask"] = _example(device, 1, 1, tokens, max_length, dtype=torch.bool, dynamic=(2,))
    yield Signature(
        "prefill",
        methods["prefill"],
        {
            "token_ids": _example(device, tokens, dtype=torch.int64, dynamic=(0,)),
            "image_embeds": _example(device, merged, hidden, dtype=dtype, dynamic=(0,)),
            "image_index": _example(device, merged, 1, dtype=torch.int64, dynamic=(0,)),
            "positions": _example(device, 3, tokens, dtype=torch.int64, dynamic=(1,)),
            "cache_index": _example(device, 1, dtype=torch.int64),
            "last": _example(device, 1, dtype=torch.int64),
            "kv_lengths": [tokens + 3],
            "keys": caches(1),
            "values": caches(1),
            **dense,
        },
        {"next_token": (1,), "checked_token": (1,), "logits": (1, config.text.vocab_size)},
    )
    for batch in batches:
        yield Signature(
            f"decode_b{batch}",
            methods["decode"],
            {
                "token_ids": _example(device, batch, dtype=torch.int64),
                "cache_index": _example(device, batch, dtype=torch.int64),
                "rope_rows": _example(device, batch, rotary_heads(config), dtype=torch.int64),
                "kv_lengths": [tokens + 2 * row for row in range(batch)],
                "keys": caches(batch),
                "values": caches(batch),
            },
            {
                "next_token": (batch,),
                "checked_token": (batch,),
                "logits": (batch, config.text.vocab_size),
                "cache_index": (batch,),
                "rope_rows": (batch, rotary_heads(config)),
            },
        )
