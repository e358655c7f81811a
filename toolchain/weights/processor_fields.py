"""Fields of the image and the video processor besides what they fold to: refused, or said not to count.

Source: Qwen2VLImageProcessor and Qwen2VLVideoProcessor of transformers 5.23. Their steps are
_STEPS and no others.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ...artifacts.errors import ConfigError
from ...artifacts.schema import shown

_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb", "do_sample_frames")
_IMAGE_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_VIDEO_TYPES = ("Qwen2VLVideoProcessor",)
# null is no default there: the step is left out, or the first picture fails
_NEVER_NULL = (
    *("do_resize", "do_rescale", "do_normalize", "resample", "rescale_factor", "image_mean", "image_std"),
    *("patch_size", "temporal_patch_size", "merge_size"),
)
_BOUNDS = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
# of transformers' class; a request says otherwise, not the checkpoint
_SAMPLING: Mapping[str, Any] = {"fps": None, "num_frames": None, "min_frames": 4, "max_frames": 768}


def picture_notes(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What of an image processor does not count, in words. Raises ConfigError for what transformers does otherwise."""
    for name in _NEVER_NULL:
        if name in settings and settings[name] is None:
            raise ConfigError(f"{where}: {name} is null, which is not its default; remove the field, or give a value")
    return tuple(_common(settings, where, "image_processor_type", _IMAGE_TYPES))


def clip_notes(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What of a video processor does not count, in words. Raises ConfigError for values that make no sense."""
    notes = list(_common(settings, where, "video_processor_type", _VIDEO_TYPES))
    for name, default in _SAMPLING.items():
        value = settings.get(name)
        if value is None:
            continue
        types, expected = ((int, float), "a positive number") if name == "fps" else ((int,), "a positive integer")
        if type(value) not in types or not 0 < value < 1 << 31:
            raise ConfigError(f"{where}: {name} is {shown(value)}, expected {expected}")
        if value != default:
            notes.append(
                f"{_named(where)}: {name} {shown(value)} does not count; a request says how its clips are sampled"
            )
    return tuple(notes)


def _common(settings: Mapping[str, Any], where: str, kind: str, known: tuple[str, ...]) -> Iterator[str]:
    if settings.get(kind) not in (None, *known):
        raise ConfigError(f"{where}: {kind} is {shown(settings[kind])}, expected {known[0]}: another processor's file")
    for name in sorted(name for name in settings if name.startswith("do_")):
        value = settings[name]
        if value is not None and type(value) is not bool:
            raise ConfigError(f"{where}: {name} is {shown(value)}, expected true or false")
        if name == "do_center_crop" and value and settings.get("crop_size") is None:
            raise ConfigError(f"{where}: do_center_crop is true without a crop_size; remove it: Qwen2-VL crops nothing")
        if value and name not in _STEPS:
            yield f"{_named(where)}: {name} does not count, as in transformers: Qwen2-VL's processor has no such step"
    size = settings.get("size")
    edges = size if isinstance(size, dict) else {}
    for name, edge in _BOUNDS:
        counts, other = settings.get(name), edges.get(edge)
        if None not in (counts, other) and counts != other:
            yield (
                f"{_named(where)}: size's {edge} {shown(other)} does not count, {name} {shown(counts)} does, as in "
                "transformers"
            )


def _named(where: str) -> str:
    """As notes name a file: without its folder."""
    return where.rpartition("/")[2]
