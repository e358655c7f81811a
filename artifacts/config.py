"""The shape of a Qwen2-VL model: one form, whichever of the two config.json layouts it came from."""

import math
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError
from .hf_fields import LARGEST_SIZE, TEXT_DEFAULTS, VISION_DEFAULTS, WHOLE_DEFAULTS, Rope, Section, read_rope
from .schema import shown

SUPPORTED_MODEL_TYPES = ("qwen2_vl",)
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


def _text(text: Section, rope: Rope, tied: bool) -> TextConfig:
    heads = text.whole("num_attention_heads")
    config = TextConfig(
        hidden_size=text.whole("hidden_size"),
        intermediate_size=text.whole("intermediate_size"),
        num_layers=text.whole("num_hidden_layers"),
        num_heads=heads,
        # null, unlike absence, means one per head
        num_kv_heads=heads if text.fields.get("num_key_value_heads", 0) is None else text.whole("num_key_value_heads"),
        vocab_size=text.whole("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=rope.theta,
        mrope_section=rope.section,
        tie_word_embeddings=tied,
        max_position_embeddings=text.whole("max_position_embeddings"),
    )
    text.only("hidden_act", "silu")
    text.only("use_sliding_window", False, None, why="sliding-window attention is not supported")
    # transformers computes with biases in q, k and v alone, whatever these say
    text.only("attention_bias", True, None)
    text.only("mlp_bias", False, None)
    text.only("head_dim", config.hidden_size // heads, None, why="hidden_size / num_attention_heads")
    layers = text.fields.get("layer_types")
    if layers is not None and layers != ["full_attention"] * config.num_layers:
        raise text.error("layer_types", f"full_attention for each of the {config.num_layers} layers")
    return config


def _vision(vision: Section) -> VisionConfig:
    embed_dim = vision.whole("embed_dim")
    mlp_dim = embed_dim * vision.number("mlp_ratio")
    if not 1 <= mlp_dim < LARGEST_SIZE:
        raise vision.error("mlp_ratio", f"embed_dim {embed_dim} times it from 1 to {LARGEST_SIZE - 1}")
    config = VisionConfig(
        depth=vision.whole("depth"),
        embed_dim=embed_dim,
        num_heads=vision.whole("num_heads"),
        mlp_dim=int(mlp_dim),
        in_channels=vision.whole("in_channels"),
        patch_size=vision.whole("patch_size"),
        temporal_patch_size=vision.whole("temporal_patch_size"),
        spatial_merge_size=vision.whole("spatial_merge_size"),
        hidden_size=vision.whole("hidden_size"),
    )
    vision.only("hidden_act", "quick_gelu")
    # the published files' name, which no version of transformers reads
    vision.same("in_chans", config.in_channels, "in_channels")
    # names that transformers takes for these since version 5
    vision.same("num_attention_heads", config.num_heads, "num_heads")
    vision.same("num_hidden_layers", config.depth, "depth")
    rope = vision.inner("rope_parameters", {})
    rope.only("rope_type", "axial", "default", None)
    rope.only("rope_theta", 10000, 10000.0, None)
    return config


def contradiction(config: ModelConfig) -> str | None:
    """What is impossible about a model's shape, in the words of config.json; None for one that can be."""
    text, vision = config.text, config.vision
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
            f"vision embed_dim {vision.embed_dim} / num_heads {vision.num_heads} must be a whole multiple of 4 "
            "(2-D rotary embedding)"
        )
    if vision.in_channels != 3:
        return f"vision in_channels is {vision.in_channels}, expected 3 (RGB)"
    if vision.hidden_size != text.hidden_size:
        return f"vision hidden_size {vision.hidden_size} differs from the text model's {text.hidden_size}"
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        if not 0 <= getattr(config, name) < text.vocab_size:
            return f"{name} is {getattr(config, name)}, outside the vocabulary of {text.vocab_size}"
    return None


def model_config_from_hf(config: Any) -> ModelConfig:
    """Read a parsed HF config.json, flat (published) or nested (`text_config`); what it leaves out has the default of
    transformers' classes.

    Raises ConfigError naming the field for a value of a wrong type or range, for what this toolchain does not compute
    (other model types, rotary embeddings, activations, quantization), and for shapes that contradict each other.
    """
    if not isinstance(config, dict):
        raise ConfigError("config.json: expected a JSON object")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {shown(model_type)} is not supported; supported: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConfigError(
            "config.json: quantization_config: quantized checkpoints "
            f"({method[:40] if isinstance(method, str) else 'unknown'}) are not supported yet; use the unquantized one"
        )
    whole = Section(config, WHOLE_DEFAULTS)
    nested = config.get("text_config") is not None
    text = whole.inner("text_config", TEXT_DEFAULTS) if nested else Section(config, TEXT_DEFAULTS)
    rope = read_rope(text)
    if nested and (config.get("rope_scaling") or config.get("rope_parameters")):
        # transformers reads the one in text_config alone; who changed this one expects it to count
        outer = read_rope(Section(config, {**TEXT_DEFAULTS, "rope_theta": rope.theta}))
        if outer != rope:
            raise ConfigError(
                f"config.json: rope_scaling or rope_parameters at the top says {outer}, text_config {rope}; keep the "
                "one in text_config"
            )
    # saved by versions from 4.52 in text_config; 5 ties where either says so
    tied = whole.flag("tie_word_embeddings") or text.flag("tie_word_embeddings")
    found = ModelConfig(
        model_type=model_type,
        text=_text(text, rope, tied),
        vision=_vision(whole.inner("vision_config", VISION_DEFAULTS)),
        image_token_id=whole.whole("image_token_id", 0),
        video_token_id=whole.whole("video_token_id", 0),
        vision_start_token_id=whole.whole("vision_start_token_id", 0),
        vision_end_token_id=whole.whole("vision_end_token_id", 0),
    )
    if problem := contradiction(found):
        raise ConfigError(f"config.json: {problem}")
    return found
