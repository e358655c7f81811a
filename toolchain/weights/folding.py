"""Rescale, mean and std of the image processor folded into the patch embedding, so that patches stay uint8."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ...artifacts.config import VisionConfig
from ...artifacts.errors import ConfigError
from ...artifacts.manifest import Folding

# transformers' Qwen2VLImageProcessor: what it takes for fields that preprocessor_config.json leaves out
_RESCALE = 1 / 255
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _flag(config: dict[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"preprocessor_config.json: {key} is {value!r}, expected true or false")
    return True if value is None else value


def _number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"preprocessor_config.json: {key} is {value!r}, expected a finite number")
    return float(value)


def _channels(config: dict[str, Any], key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != 3:
        raise ConfigError(f"preprocessor_config.json: {key} is {value!r}, expected three numbers, one per channel")
    return (_number(value[0], key), _number(value[1], key), _number(value[2], key))


def folding_from_hf(config: dict[str, Any], vision: VisionConfig) -> Folding:
    """What preprocessor_config.json does to a pixel. A step that it switches off folds as 1, 0 and 1.

    Raises ConfigError for values that cannot be folded, and for patch sizes that differ from the model's.
    """
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for key, wanted in sizes.items():
        if config.get(key, wanted) != wanted:
            raise ConfigError(f"preprocessor_config.json: {key} is {config[key]!r}, config.json says {wanted}")
    rescale, mean, std = 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if _flag(config, "do_rescale"):
        factor = config.get("rescale_factor")
        rescale = _number(_RESCALE if factor is None else factor, "rescale_factor")
    if _flag(config, "do_normalize"):
        mean, std = _channels(config, "image_mean", _MEAN), _channels(config, "image_std", _STD)
    if rescale <= 0:
        raise ConfigError(f"preprocessor_config.json: rescale_factor is {rescale}, expected a positive number")
    if min(std) <= 0:
        raise ConfigError(f"preprocessor_config.json: image_std is {list(std)}, expected positive numbers")
    return Folding(rescale, mean, std)


def fold_weight(kernel: npt.NDArray[Any], folding: Folding, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The Conv3d kernel [width, channels, frames, rows, columns] as a matrix [width, patch_dim] for uint8 patches.

    Computed in fp64 and rounded once: W' = W * rescale / std.
    """
    scale = folding.rescale_factor / np.array(folding.image_std, np.float64)
    folded = kernel.astype(np.float64) * scale[:, None, None, None]
    with np.errstate(over="ignore"):
        return folded.reshape(len(kernel), -1).astype(dtype)


def fold_bias(weight: npt.NDArray[Any], folding: Folding, channels: int) -> npt.NDArray[np.float32]:
    """What normalization's mean adds, [width] fp32: -sum(W' * mean / rescale), from W' as rounded.

    With the unrounded weights the errors of W' at the mean colour, which every patch contains, would not cancel.
    """
    mean = np.array(folding.image_mean, np.float64) / folding.rescale_factor
    per_channel = weight.astype(np.float64).reshape(len(weight), channels, -1).sum(axis=2)
    return (-(per_channel * mean).sum(axis=1)).astype(np.float32)
