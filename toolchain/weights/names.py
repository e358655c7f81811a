"""Which tensors of a HF checkpoint make each parameter of the artifact, and how checkpoints name them."""

from dataclasses import dataclass
from enum import Enum

from ...artifacts.config import ModelConfig
from ...artifacts.parameters import Parameter


class Make(Enum):
    """How a parameter comes from its sources."""

    ROWS = "the sources one below the other"
    PATCH_WEIGHT = "the Conv3d kernel as a matrix, image normalization folded in"
    PATCH_BIAS = "what the folded mean adds"


@dataclass(frozen=True)
class Rule:
    """The sources (legacy name, shape) of one parameter."""

    parameter: Parameter
    make: Make
    sources: tuple[tuple[str, tuple[int, ...]], ...]


def rule_for(parameter: Parameter, config: ModelConfig) -> Rule:
    """The rule of one parameter; sources have the legacy names, under which published checkpoints are stored."""
    name, shape = parameter.name, parameter.shape
    vision, text = config.vision, config.text
    owner, kind = name.rsplit(".", 1)
    if owner == "visual.patch_embed":
        kernel = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        make = Make.PATCH_WEIGHT if kind == "weight" else Make.PATCH_BIAS
        return Rule(parameter, make, (("visual.patch_embed.proj.weight", (vision.embed_dim, *kernel)),))
    if owner.endswith(".self_attn.qkv_proj"):
        parts = {"q_proj": text.hidden_size, "k_proj": text.kv_dim, "v_proj": text.kv_dim}
    elif owner.endswith(".mlp.gate_up_proj"):
        parts = {"gate_proj": text.intermediate_size, "up_proj": text.intermediate_size}
    else:
        return Rule(parameter, Make.ROWS, ((name, shape),))
    block = owner.rsplit(".", 1)[0]
    sources = tuple((f"{block}.{part}.{kind}", (rows, *shape[1:])) for part, rows in parts.items())
    return Rule(parameter, Make.ROWS, sources)


def legacy_name(stored: str) -> str:
    """`model.visual.*` and `model.language_model.*` (transformers >= 4.52) as `visual.*` and `model.*`."""
    if stored.startswith("model.visual."):
        return stored.removeprefix("model.")
    if stored.startswith("model.language_model."):
        return "model." + stored.removeprefix("model.language_model.")
    return stored


def new_name(legacy: str) -> str:
    """The inverse of `legacy_name` for checkpoints with the new names."""
    if legacy.startswith("visual."):
        return f"model.{legacy}"
    if legacy.startswith("model."):
        return "model.language_model." + legacy.removeprefix("model.")
    return legacy


def is_recomputed(name: str) -> bool:
    """Buffers that old checkpoints store and every implementation computes from config.json: rotary frequencies."""
    return name.endswith(("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"))


def is_quantized(name: str) -> bool:
    """Tensors of GPTQ, AWQ and compressed checkpoints."""
    return name.endswith((".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_packed"))
