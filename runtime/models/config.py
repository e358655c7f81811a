"""The shape of a model, as every family has it: a vision tower before a decoder. Families add what is theirs."""

import math
from dataclasses import dataclass, fields

from .fields import LARGEST_SIZE

# far above any model; without a limit a config of a few bytes could ask for weeks of work
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. `hidden_size` is its output width, equal to the text model's."""

    depth: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    hidden_size: int

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch: channels x frames x rows x columns."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merged_dim(self) -> int:
        """Width of the merger's input: one row holds spatial_merge_size**2 patches."""
        return self.embed_dim * self.spatial_merge_size**2


@dataclass(frozen=True)
class TextConfig:
    """The language model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    max_position_embeddings: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def rotary_heads(self) -> int:
        """The heads that one rotation takes: those of q, of k, and of v, which passes through."""
        return self.num_heads + 2 * self.num_kv_heads


@dataclass(frozen=True)
class ModelConfig:
    """Everything the graphs, the converter and the runtime need of config.json."""

    model_type: str
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    def contradiction(self) -> str | None:
        """What is impossible about the model's shape, in the words of config.json; None for one that can be."""
        text, vision = self.text, self.vision
        if not (0 < text.num_layers <= _MOST_LAYERS and 0 < vision.depth <= _MOST_LAYERS):
            return f"num_hidden_layers {text.num_layers} and vision depth {vision.depth}: expected 1 to {_MOST_LAYERS}"
        for part, where in ((text, ""), (vision, "vision ")):
            for field in fields(part):
                value = getattr(part, field.name)
                if type(value) is int and not 0 < value < LARGEST_SIZE:
                    return f"{where}{field.name} is {value}, expected 1 to {LARGEST_SIZE - 1}"
                if type(value) is float and not 0 < value < math.inf:
                    return f"{where}{field.name} is {value}, expected a positive number"
        if text.hidden_size % text.num_heads or text.num_heads % text.num_kv_heads:
            return (
                f"hidden_size {text.hidden_size}, num_attention_heads {text.num_heads} and "
                f"num_key_value_heads {text.num_kv_heads} must each divide the one before"
            )
        section = list(text.mrope_section)
        if min(section) <= 0 or 2 * sum(section) != text.head_dim:
            return f"mrope_section {section} sums to {sum(section)}, expected half of head_dim {text.head_dim}"
        if vision.embed_dim % vision.num_heads or vision.head_dim % 4:
            return (
                f"the vision tower's width {vision.embed_dim} / num_heads {vision.num_heads} must be a whole multiple "
                "of 4 (2-D rotary embedding)"
            )
        if vision.in_channels != 3:
            return f"vision in_channels is {vision.in_channels}, expected 3 (RGB)"
        if vision.hidden_size != text.hidden_size:
            return f"the vision tower's output {vision.hidden_size} differs from the text model's {text.hidden_size}"
        for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
            if not 0 <= getattr(self, name) < text.vocab_size:
                return f"{name} is {getattr(self, name)}, outside the vocabulary of {text.vocab_size}"
        return None
