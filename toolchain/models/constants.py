"""Values of the tables that the graphs read: rotary cos and sin, the columns of each axis, the causal mask."""

import torch
from torch import Tensor

from ...artifacts.config import ModelConfig
from .form import Form
from .signatures import MAX_VISION_SIDE, rotary_heads
from .text import CAUSAL_MASK_SIDE

# Qwen2-VL's vision tower fixes it; config.json has no field for it
_VISION_THETA = 10000.0


def _angles(length: int, dim: int, theta: float) -> Tensor:
    """Rotary angles [length, dim / 2], in the fp32 arithmetic of transformers' rotary embeddings."""
    inverse = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return torch.outer(torch.arange(length, dtype=torch.float32), inverse)


def _cos_sin(angles: Tensor, repeats: int) -> Tensor:
    full = angles.repeat(1, repeats)
    return torch.cat([full.cos(), full.sin()], 1)


def constant_tables(config: ModelConfig, max_length: int, dtype: torch.dtype, form: Form) -> dict[str, Tensor]:
    """The tensors of `signatures.Constants`, by name.

    text_rope [max_length + 1, 2 D] and vision_rope [sides, 2 D]: cos | sin by position, each laid out for the
    half-split rotation; text_rope's last row is cos 1 and sin 0. The axes tables hold 1 in the columns that turn by
    that axis' position and 0 elsewhere.
    """
    text, vision = config.text, config.vision
    section = torch.repeat_interleave(torch.arange(3), torch.tensor(text.mrope_section))
    text_axis = section.repeat(4)  # two halves of the head, for cos and for sin
    quarter = vision.head_dim // 4
    vision_axis = torch.repeat_interleave(torch.arange(2), quarter).repeat(4)
    turning = torch.ones(rotary_heads(config))
    turning[-text.num_kv_heads :] = 0
    # the angle 0
    still = _cos_sin(torch.zeros(1, text.head_dim // 2), 2)
    tables = {
        "text_rope": torch.cat([_cos_sin(_angles(max_length, text.head_dim, text.rope_theta), 2), still]),
        "text_rope_axes": (text_axis == torch.arange(3)[:, None]).float()[:, None],
        # rows and columns share the same angles, so one table serves both axes
        "vision_rope": _cos_sin(_angles(MAX_VISION_SIDE, vision.head_dim // 2, _VISION_THETA), 4),
        "vision_rope_axes": (vision_axis == torch.arange(2)[:, None]).float()[:, None],
        "turning_heads": turning[None, None, :, None],
        "passing_heads": (1 - turning[None, None, :, None]) * still,
    }
    tables = {name: table.to(dtype).contiguous() for name, table in tables.items()}
    tables["next_rope_rows"] = turning[None].to(torch.int64)
    if form.operators == "fused":
        # true hides: FusedInferAttentionScore takes the strictly upper triangle
        tables["causal_mask"] = torch.ones(CAUSAL_MASK_SIDE, CAUSAL_MASK_SIDE, dtype=torch.bool).triu(1)
    return tables
