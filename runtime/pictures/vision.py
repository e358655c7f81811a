"""How pictures become patches: the settings that a checkpoint states."""

from dataclasses import dataclass
from typing import Any

from ...artifacts.errors import ArtifactError
from ...artifacts.schema import parse_json, shown

_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, without importing PIL for a number
_DEFAULT_MIN_PIXELS = 56 * 56
_DEFAULT_MAX_PIXELS = 28 * 28 * 1280


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become patches. min_pixels and max_pixels bound the area of a resized picture or frame."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    @property
    def factor(self) -> int:
        """Pixels that both sides of a resized picture are a multiple of: one merge window."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def image_settings_from_hf(data: bytes, where: str = "preprocessor_config.json") -> ImageSettings:
    """Read preprocessor_config.json; what it leaves out has the default of transformers' Qwen2VLImageProcessorPil.

    The pixel bounds stand in min_pixels / max_pixels, or in size.shortest_edge / size.longest_edge (which mean the same
    here); where both are given the former win, as in transformers. Raises ArtifactError for values that cannot be
    served.
    """
    plain = parse_json(data, where)
    if not isinstance(plain, dict):
        raise ArtifactError(f"{where}: got {type(plain).__name__}, expected an object")
    for switch in ("do_resize", "do_convert_rgb"):
        if plain.get(switch) not in (None, True):
            raise ArtifactError(f"{where}: {switch} is {shown(plain[switch])}; only true is supported")
    if plain.get("resample") not in (None, _BICUBIC):
        raise ArtifactError(f"{where}: resample is {shown(plain['resample'])}, expected {_BICUBIC} (bicubic)")
    size = plain.get("size")
    if size is not None and not isinstance(size, dict):
        raise ArtifactError(f"{where}: size is {shown(size)}, expected an object with shortest_edge and longest_edge")
    size = {"shortest_edge": _DEFAULT_MIN_PIXELS, "longest_edge": _DEFAULT_MAX_PIXELS} if size is None else size

    def positive(name: str, *candidates: Any) -> int:
        value = next(candidate for candidate in candidates if candidate is not None)
        if type(value) is not int or value <= 0:
            raise ArtifactError(f"{where}: {name} is {shown(value)}, expected a positive integer")
        return value

    def bound(name: str, edge: str) -> int:
        candidates = (plain.get(name), size.get(edge), size.get(name))
        if all(candidate is None for candidate in candidates):
            raise ArtifactError(
                f"{where}: size has {shown(sorted(size))} and no {edge}, nor is there a {name}; expected shortest_edge "
                "and longest_edge (in pixels of area)"
            )
        return positive(name, *candidates)

    settings = ImageSettings(
        min_pixels=bound("min_pixels", "shortest_edge"),
        max_pixels=bound("max_pixels", "longest_edge"),
        patch_size=positive("patch_size", plain.get("patch_size"), 14),
        temporal_patch_size=positive("temporal_patch_size", plain.get("temporal_patch_size"), 2),
        merge_size=positive("merge_size", plain.get("merge_size"), 2),
    )
    if settings.min_pixels > settings.max_pixels:
        raise ArtifactError(f"{where}: min_pixels {settings.min_pixels} is above max_pixels {settings.max_pixels}")
    return settings
