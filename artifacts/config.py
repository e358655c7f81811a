"""The shape of a Qwen2-VL model: one form, whichever of the two config.json layouts it came from."""

import math
from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError

SUPPORTED_MODEL_TYPES = ("qwen2_vl",)
# far above any model; without a limit a config of a few bytes could ask for weeks of work
_MOST_LAYERS = 4096
_LARGEST_SIZE = 1 << 31


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


def _take(source: dict[str, Any], key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
    value = source.get(key, default)
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config.json: {key} is {value!r}, expected {getattr(kind, '__name__', kind)}")
    return value


def _positive(source: dict[str, Any], key: str, default: Any = None) -> int:
    value: int = _take(source, key, int, default)
    if value <= 0:
        raise ConfigError(f"config.json: {key} is {value}, expected a positive integer")
    return value


def _positive_float(source: dict[str, Any], key: str, default: float) -> float:
    value = float(_take(source, key, float, default))
    if not math.isfinite(value) or value <= 0:
        raise ConfigError(f"config.json: {key} is {value}, expected a positive number")
    return value


def _text(text: dict[str, Any], whole: dict[str, Any]) -> TextConfig:
    # transformers renamed rope_scaling to rope_parameters and moved rope_theta into it
    rope = text.get("rope_parameters") or text.get("rope_scaling") or whole.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type")
    if kind not in ("mrope", "default") or "mrope_section" not in rope:
        raise ConfigError(f"config.json: rotary embedding is {rope!r}, expected type mrope with mrope_section")
    section = rope["mrope_section"]
    if not isinstance(section, list) or len(section) != 3 or not all(type(n) is int and n > 0 for n in section):
        raise ConfigError(f"config.json: mrope_section is {section!r}, expected three positive integers")
    if _take(text, "hidden_act", str, "silu") != "silu":
        raise ConfigError(f"config.json: hidden_act is {text['hidden_act']!r}, expected 'silu'")
    if text.get("use_sliding_window"):
        raise ConfigError("config.json: use_sliding_window is true; sliding-window attention is not supported")
    theta = rope if "rope_theta" in rope else text
    heads = _positive(text, "num_attention_heads")
    config = TextConfig(
        hidden_size=_positive(text, "hidden_size"),
        intermediate_size=_positive(text, "intermediate_size"),
        num_layers=_positive(text, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_positive(text, "num_key_value_heads", heads),
        vocab_size=_positive(text, "vocab_size"),
        rms_norm_eps=_positive_float(text, "rms_norm_eps", 1e-6),
        rope_theta=_positive_float(theta, "rope_theta", 1e6),
        mrope_section=(section[0], section[1], section[2]),
        tie_word_embeddings=_take(
            whole if "tie_word_embeddings" in whole else text, "tie_word_embeddings", bool, False
        ),
        max_position_embeddings=_positive(text, "max_position_embeddings", 32768),
    )
    return config


def _vision(vision: dict[str, Any]) -> VisionConfig:
    if _take(vision, "hidden_act", str, "quick_gelu") != "quick_gelu":
        raise ConfigError(f"config.json: vision hidden_act is {vision['hidden_act']!r}, expected 'quick_gelu'")
    embed_dim = _positive(vision, "embed_dim")
    config = VisionConfig(
        depth=_positive(vision, "depth"),
        embed_dim=embed_dim,
        num_heads=_positive(vision, "num_heads"),
        mlp_dim=int(min(embed_dim * _positive_float(vision, "mlp_ratio", 4), _LARGEST_SIZE)),
        # the published files write in_chans, transformers saves in_channels
        in_channels=_positive(vision, "in_channels", vision.get("in_chans", 3)),
        patch_size=_positive(vision, "patch_size"),
        temporal_patch_size=_positive(vision, "temporal_patch_size", 2),
        spatial_merge_size=_positive(vision, "spatial_merge_size", 2),
        hidden_size=_positive(vision, "hidden_size"),
    )
    return config


def contradiction(config: ModelConfig) -> str | None:
    """What is impossible about a model's shape, in the words of config.json; None for one that can be."""
    text, vision = config.text, config.vision
    if not (0 < text.num_layers <= _MOST_LAYERS and 0 < vision.depth <= _MOST_LAYERS):
        return f"num_hidden_layers {text.num_layers} and vision depth {vision.depth}: expected 1 to {_MOST_LAYERS}"
    for part, where in ((text, ""), (vision, "vision ")):
        for field in fields(part):
            value = getattr(part, field.name)
            if type(value) is int and not 0 < value < _LARGEST_SIZE:
                return f"{where}{field.name} is {value}, expected 1 to {_LARGEST_SIZE - 1}"
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
    """Read a parsed HF config.json, flat (published) or nested (`text_config`).

    Raises ConfigError for an unsupported model_type, quantized checkpoints, and shapes that contradict each other.
    """
    if not isinstance(config, dict):
        raise ConfigError("config.json: expected a JSON object")
    model_type = config.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ConfigError(
            f"config.json: quantized checkpoints ({method}) are not supported yet; use the unquantized one"
        )
    text = config.get("text_config", config)
    vision = config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ConfigError("config.json: text_config and vision_config must be JSON objects")
    text_config = _text(text, config)

    def token(key: str, default: int) -> int:
        # transformers' own defaults for Qwen2-VL, where a nested config.json leaves the field out
        value: int = _take(config if key in config else text, key, int, default)
        return value

    found = ModelConfig(
        model_type=model_type,
        text=text_config,
        vision=_vision(vision),
        image_token_id=token("image_token_id", 151655),
        video_token_id=token("video_token_id", 151656),
        vision_start_token_id=token("vision_start_token_id", 151652),
        vision_end_token_id=token("vision_end_token_id", 151653),
    )
    if problem := contradiction(found):
        raise ConfigError(f"config.json: {problem}")
    return found
