"""Checkpoints with random weights in the form that HF publishes: for tests and benchmarks.

Everything is a function of the seed and the tensor's name: the same tensor has the same values whatever the layout,
the naming or the number of shards, and a bf16 checkpoint holds the rounded values of the fp32 one.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qwen2vl_tc.artifacts.dtypes import stored_name, torch_name
from qwen2vl_tc.artifacts.naming import naming
from qwen2vl_tc.artifacts.safetensors import header_bytes
from qwen2vl_tc.runtime.dtypes import numpy_dtype
from qwen2vl_tc.runtime.models import config_from_hf, family_of
from qwen2vl_tc.runtime.models.base import Role
from qwen2vl_tc.runtime.models.config import ModelConfig
from qwen2vl_tc.toolchain.weights.names import new_name

from .synthetic_tokenizer import SPECIAL_TOKENS, write_json, write_tokenizer

LOGIT_STD = 5.0
_BLOCK_VALUES = 1 << 22
# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
_PUBLISHED = {
    "2b": (1536, 8960, 28, 12, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}


def _mrope_section(head_dim: int) -> list[int]:
    # the published 16, 24, 24 of 64: a quarter for time, the rest halved between rows and columns
    half = head_dim // 2
    time = max(half // 4, 1)
    rows = (half - time) // 2
    return [time, rows, half - time - rows]


def _config(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool, vision: dict[str, Any]
) -> dict[str, Any]:
    first = 151643 if vocab > 151643 + len(SPECIAL_TOKENS) else vocab - len(SPECIAL_TOKENS)
    token = {name: first + i for i, name in enumerate(SPECIAL_TOKENS)}
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": token["<|endoftext|>"],
        "eos_token_id": token["<|im_end|>"],
        "vision_start_token_id": token["<|vision_start|>"],
        "vision_end_token_id": token["<|vision_end|>"],
        "vision_token_id": token["<|vision_pad|>"],
        "image_token_id": token["<|image_pad|>"],
        "video_token_id": token["<|video_pad|>"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "qwen2_vl",
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": _mrope_section(hidden // heads)},
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_window_layers": layers,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "mlp_ratio": 4,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "hidden_size": hidden,
            **vision,
        },
    }


def published(size: str) -> dict[str, Any]:
    """The config.json of the published "2b", "7b" or "72b" model."""
    return _config(*_PUBLISHED[size], vision={})


def tiny_config(
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 320,
    tie_word_embeddings: bool = False,
    vision: dict[str, Any] | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """A flat config.json of a model that runs in milliseconds; `vision` and `overrides` replace single fields.

    The special tokens take the last ids of the vocabulary, which must hold 256 bytes beside them.
    """
    small = {"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2}
    config = _config(
        hidden_size,
        intermediate_size,
        num_hidden_layers,
        num_attention_heads,
        num_key_value_heads,
        vocab_size,
        tie_word_embeddings,
        {**small, **(vision or {})},
    )
    return {**config, **overrides}


# hidden, intermediate, layers, heads, kv heads, vocabulary, tied
_PUBLISHED_2_5 = {
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "32b": (5120, 27648, 64, 40, 8, 152064, False),
    "72b": (8192, 29568, 80, 64, 8, 152064, False),
}


def published_2_5(size: str) -> dict[str, Any]:
    """The config.json of the published Qwen2.5-VL "3b", "7b", "32b" or "72b"."""
    vision = {"hidden_size": 1280, "intermediate_size": 3456 if size == "72b" else 3420}
    return windowed_config(_config(*_PUBLISHED_2_5[size], vision={}), **vision)


def windowed_config(config: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """A Qwen2.5-VL with the text model of a flat config; `vision` replaces single fields of the published tower, whose
    window_size, depth, heads and blocks with full attention are left out as the published files do."""
    tower = {
        "in_chans": 3,
        "out_hidden_size": config["hidden_size"],
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
        **vision,
    }
    names = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    rope = {**config["rope_scaling"], "type": "default", "rope_type": "default"}
    return {**config, **names, "rope_scaling": rope, "vision_config": tower}


def tiny_windowed(**changes: Any) -> dict[str, Any]:
    """A Qwen2.5-VL that runs in milliseconds, with windows of 2 x 2 merge windows; see tiny_config for changes."""
    small = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1, 3],
    }
    vision = changes.pop("vision", {})
    return windowed_config(tiny_config(**changes), **{**small, **vision})


def nested_config(config: dict[str, Any], dtype: str = "bf16") -> dict[str, Any]:
    """The flat config.json in the form that transformers >= 4.52 saves: text_config, and rope inside it."""
    outer = ("architectures", "model_type", "vision_config", "tie_word_embeddings")
    tokens = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    text = {key: value for key, value in config.items() if key not in (*outer, *tokens)}
    section = text.pop("rope_scaling")["mrope_section"]
    text.pop("torch_dtype", None)
    text["rope_parameters"] = {
        "rope_type": "default",
        "type": "mrope",
        "mrope_section": section,
        "rope_theta": text.pop("rope_theta"),
    }
    text |= {"model_type": f"{config['model_type']}_text", "dtype": torch_name(dtype)}
    vision = {**config["vision_config"], "model_type": f"{config['model_type']}_vision"}
    vision["in_channels"] = vision.pop("in_chans", 3)
    vision.pop("spatial_patch_size", None)
    kept = {key: config[key] for key in (*outer, *tokens) if key in config}
    return {**kept, "dtype": torch_name(dtype), "text_config": text, "vision_config": vision}


@dataclass(frozen=True)
class _Tensor:
    """`name` is the legacy one; values are normal with this mean and standard deviation."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0


def _tensors(config: ModelConfig) -> list[_Tensor]:
    """Every tensor of a checkpoint, in the order of the model. Scaled so that logits have a deviation of LOGIT_STD."""
    made: dict[str, _Tensor] = {}
    head_std = LOGIT_STD / math.sqrt(config.text.hidden_size)
    stds = {
        Role.BIAS: 0.1,
        Role.NORM: 0.1,
        Role.SHIFT: 0.1,
        Role.EMBEDDING: head_std if config.text.tie_word_embeddings else 1.0,
        Role.HEAD: head_std,
    }
    for weight in family_of(config).weights(config):
        for name, shape, _ in weight.parts:
            std = stds.get(weight.role) or 1 / math.sqrt(math.prod(shape[1:]))
            # the patch embedding's kernel makes two tensors
            made.setdefault(name, _Tensor(name, shape, std, float(weight.role is Role.NORM)))
    return list(made.values())


def _fill(file: BinaryIO, tensor: _Tensor, seed: int, dtype: str) -> None:
    """Write the tensor's values, a block at a time so that memory stays small."""
    random = np.random.Generator(np.random.SFC64([seed, zlib.crc32(tensor.name.encode())]))
    remaining = math.prod(tensor.shape)
    while remaining:
        values = random.standard_normal(min(remaining, _BLOCK_VALUES), dtype=np.float32)
        remaining -= len(values)
        values *= np.float32(tensor.std)
        values += np.float32(tensor.mean)
        file.write(values.astype(numpy_dtype(dtype)).view(np.uint8).data)


def _shards(tensors: list[_Tensor], count: int) -> list[list[_Tensor]]:
    """Split into `count` runs of about equal size."""
    total = sum(math.prod(t.shape) for t in tensors)
    shards: list[list[_Tensor]] = [[] for _ in range(count)]
    before = 0
    for tensor in tensors:
        shards[min(before * count // total, count - 1)].append(tensor)
        before += math.prod(tensor.shape)
    return [shard for shard in shards if shard]


def write_checkpoint(
    folder: Path,
    config: dict[str, Any],
    *,
    seed: int = 0,
    dtype: str = "bf16",
    layout: str = "flat",
    names: str = "legacy",
    shards: int = 1,
    stored_head: bool = False,
    tokenizer: bool = False,
    zeros: bool = False,
) -> Path:
    """Write a random checkpoint like HF's into `folder` (made if absent) and return it.

    config: a flat config.json, from `tiny_config` or `published`.
    dtype: "bf16", "fp16" or "fp32" of every tensor.
    layout: "flat" or "nested" config.json.
    names: "legacy" (`visual.`, `model.layers.`) or "new" (`model.visual.`, `model.language_model.`).
    shards: 1 writes model.safetensors, more write an index beside them.
    stored_head: a tied checkpoint also stores lm_head.weight.
    tokenizer: also write a byte-level tokenizer, chat template and generation config.
    zeros: leave the data a hole in the file, which takes no disk: for shapes too large to write out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = config_from_hf(config)
    plain = {**config, "torch_dtype": torch_name(dtype)}
    write_json(folder / "config.json", nested_config(plain, dtype) if layout == "nested" else plain)
    tensors = _tensors(model)
    # by name, as save_pretrained does: unlike the model's own order
    parts = _shards(sorted(tensors, key=lambda t: t.name), shards)
    index: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        file_name = "model.safetensors" if shards == 1 else f"model-{number:05}-of-{len(parts):05}.safetensors"
        stored = [(new_name(t.name) if names == "new" else t.name, t) for t in part]
        if stored_head and model.text.tie_word_embeddings and number == len(parts):
            embedding = next(t for t in tensors if t.name == "model.embed_tokens.weight")
            stored.append(("lm_head.weight", embedding))
        index |= dict.fromkeys((name for name, _ in stored), file_name)
        with naming(folder / file_name), open(folder / file_name, "wb") as file:
            file.write(header_bytes((name, stored_name(dtype), t.shape) for name, t in stored))
            if zeros:
                values = sum(math.prod(t.shape) for _, t in stored)
                file.truncate(file.tell() + values * numpy_dtype(dtype).itemsize)
            else:
                for _, tensor in stored:
                    _fill(file, tensor, seed, dtype)
    if shards > 1:
        bytes_in_all = sum(math.prod(t.shape) for t in tensors) * numpy_dtype(dtype).itemsize
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": bytes_in_all}, "weight_map": index}
        )
    write_json(folder / "preprocessor_config.json", preprocessor_config(model))
    if tokenizer:
        write_tokenizer(folder, config)
    return folder


def preprocessor_config(model: ModelConfig) -> dict[str, Any]:
    """The published preprocessor_config.json, with this model's patch size."""
    return {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": model.vision.patch_size,
        "temporal_patch_size": model.vision.temporal_patch_size,
        "merge_size": model.vision.spatial_merge_size,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
