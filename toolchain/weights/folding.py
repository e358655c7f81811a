"""Rescale, mean and std of the image processor folded into the patch embedding, so that patches stay uint8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...artifacts.errors import ConfigError
from ...artifacts.manifest import Folding
from ...artifacts.schema import shown
from ...runtime.models.config import VisionConfig

# transformers' Qwen2VLImageProcessor: what it takes for fields that preprocessor_config.json leaves out
_RESCALE = 1 / 255
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Settings:
    """A processor's settings; `where` is the file, and the object in it."""

    fields: Mapping[str, Any]
    where: str

    def error(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} is {shown(self.fields.get(key))}, expected {expected}")

    def flag(self, key: str) -> bool:
        value = self.fields.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return True if value is None else value

    def number(self, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) < 1e300:
            raise ConfigError(f"{self.where}: {key} is {shown(value)}, expected a finite number")
        return float(value)

    def channels(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        value = self.fields.get(key)
        if value is None:
            return default
        if not isinstance(value, list) or len(value) != 3:
            raise self.error(key, "three numbers, one per channel")
        return (self.number(key, value[0]), self.number(key, value[1]), self.number(key, value[2]))


def folding_from_hf(
    config: Mapping[str, Any], vision: VisionConfig, where: str = "preprocessor_config.json"
) -> Folding:
    """What an image processor does to a pixel. A step that it switches off folds as 1, 0 and 1.

    Raises ConfigError for values that cannot be folded, and for patch sizes that differ from the model's.
    """
    settings = _Settings(config, where)
    sizes = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
    }
    for key, wanted in sizes.items():
        if config.get(key) not in (None, wanted):
            raise ConfigError(f"{where}: {key} is {shown(config[key])}, config.json says {wanted}")
    rescale, mean, std = 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if settings.flag("do_rescale"):
        factor = config.get("rescale_factor")
        rescale = settings.number("rescale_factor", _RESCALE if factor is None else factor)
    if settings.flag("do_normalize"):
        mean, std = settings.channels("image_mean", _MEAN), settings.channels("image_std", _STD)
    if rescale <= 0:
        raise ConfigError(f"{where}: rescale_factor is {rescale}, expected a positive number")
    if min(std) <= 0:
        raise ConfigError(f"{where}: image_std is {list(std)}, expected positive numbers")
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
