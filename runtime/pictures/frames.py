"""Which frames of a video the model sees: qwen-vl-utils' rule and that of transformers' Qwen2-VL video processor."""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from ...artifacts.errors import RequestError

SAMPLING_RULES = ("qwen", "transformers")

# qwen-vl-utils 0.0.14, vision_process.py; transformers 5.23 has the same bounds of the frame count
DEFAULT_FPS, _MIN_FRAMES, _MAX_FRAMES = 2.0, 4, 768
# of any number that a request gives: beyond it, floats overflow
MOST = 1 << 31
# floats in the vectors that torch.arange fills: the rounding of a vector's first value reaches the others
_VECTOR = 8


@dataclass(frozen=True)
class FrameRequest:
    """What a request says of a video's frames; None leaves it to the rule.

    fps, within min_frames and max_frames, or nframes; from video_start to video_end, in seconds. sample_fps: the rate
    at which a list of frames was sampled.
    """

    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    video_start: float | None = None
    video_end: float | None = None
    sample_fps: float | None = None


def sample_frames(
    wanted: FrameRequest, rule: str, total: int, video_fps: float, multiple: int
) -> tuple[list[int], float]:
    """Indices, in order of display, of the frames to take from a video of `total` frames at video_fps, and their rate.

    multiple: what the count is rounded to, the model's temporal_patch_size.

    A video shorter than `multiple` is taken whole, whatever count is asked for: its last frame is repeated.
    "qwen": calculate_video_frame_range and smart_nframes, then torch.linspace in fp32, rounded half to even.
    "transformers": Qwen2VLVideoProcessor.sample_frames, torch.arange in fp32, rounded down; every frame where neither
    fps nor nframes is given. The rate, in frames a second, is both libraries' (fetch_video, VideoMetadata.sampled_fps).
    Raises RequestError for values that make no sense and where the library raises.
    """
    check_frames(wanted)
    if total <= 0:
        raise RequestError("has no frames")
    if wanted.fps is not None and wanted.nframes is not None:
        raise RequestError("fps and nframes are both given; keep one")
    if rule == "qwen":
        first, last = _range(wanted, total, video_fps)
        total = last - first + 1
        chosen = _qwen(wanted, first, last, video_fps, multiple)
    else:
        chosen = _transformers(wanted, total, video_fps, multiple)
    return chosen, len(chosen) / total * video_fps


def check_frames(wanted: FrameRequest) -> None:
    """Raises RequestError for a value that is no number, or one out of range."""
    for field in fields(wanted):
        value: Any = getattr(wanted, field.name)
        if value is None:
            continue
        if isinstance(value, int | float) and abs(value) > MOST:
            # not shown: Python refuses to print, or to make a float of, integers of thousands of digits
            raise RequestError(f"{field.name} is out of range, expected a number of at most {MOST}")
        if field.name in ("nframes", "min_frames", "max_frames"):
            if type(value) is not int or value <= 0:
                raise RequestError(f"{field.name} is {value!r}, expected a positive integer")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise RequestError(f"{field.name} is {value!r}, expected a number")
        elif field.name in ("fps", "sample_fps") and value <= 0:
            raise RequestError(f"{field.name} is {value!r}, expected a positive number")


def _qwen(wanted: FrameRequest, first: int, last: int, video_fps: float, multiple: int) -> list[int]:
    total = last - first + 1
    if total < multiple:
        return list(range(first, last + 1))
    if wanted.nframes is not None:
        count = round(wanted.nframes / multiple) * multiple
    else:
        least = math.ceil((wanted.min_frames or _MIN_FRAMES) / multiple) * multiple
        most = math.floor((wanted.max_frames or min(_MAX_FRAMES, total)) / multiple) * multiple
        exact = total / video_fps * (wanted.fps or DEFAULT_FPS)
        count = math.floor(min(max(exact, least), most, total) / multiple) * multiple
    if not multiple <= count <= total:
        raise RequestError(
            f"{count} of {total} frames were asked for, expected {multiple} to {total}; change nframes, fps or the "
            "time range"
        )
    return _linspace(first, last, count)


def _range(wanted: FrameRequest, total: int, video_fps: float) -> tuple[int, int]:
    duration = total / video_fps
    first, last = 0, total - 1
    if wanted.video_start is not None:
        first = math.ceil(max(0.0, min(wanted.video_start, duration)) * video_fps)
    if wanted.video_end is not None:
        last = min(math.floor(max(0.0, min(wanted.video_end, duration)) * video_fps), total - 1)
    # one frame of several is no clip to the library; of a video that has no more, it is all there is
    if (wanted.video_start is not None or wanted.video_end is not None) and last - first < min(1, total - 1):
        raise RequestError(
            f"video_start {wanted.video_start} and video_end {wanted.video_end} leave no frames of a video of "
            f"{duration:.2f} s ({total} frames)"
        )
    return first, last


def _linspace(first: int, last: int, count: int) -> list[int]:
    """torch.linspace(first, last, count).round(): from both ends to the middle, each with one fp32 rounding (FMA)."""
    if count == 1:
        return [first]
    step = float((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    index = np.arange(count)
    exact = np.where(index < count // 2, first + step * index, last - step * (count - 1 - index))
    chosen: list[int] = np.rint(exact.astype(np.float32)).astype(np.int64).tolist()
    return chosen


def _transformers(wanted: FrameRequest, total: int, video_fps: float, multiple: int) -> list[int]:
    if wanted.video_start is not None or wanted.video_end is not None:
        raise RequestError("transformers' sampling has no video_start or video_end; use the default sampling")
    if total < multiple:
        return list(range(total))
    if wanted.nframes is not None:
        count = round(wanted.nframes / multiple) * multiple
    elif wanted.fps is not None:
        most = math.floor(min(wanted.max_frames or _MAX_FRAMES, total) / multiple) * multiple
        exact = min(max(total / video_fps * wanted.fps, wanted.min_frames or _MIN_FRAMES), most, total)
        count = math.floor(exact / multiple) * multiple
    else:
        return list(range(total))
    if not 0 < count <= total:
        raise RequestError(f"{count} of {total} frames were asked for, expected 1 to {total}; change nframes or fps")
    # rounding up makes torch.arange end behind the last frame, where the library fails
    return [index for index in _arange(total, count) if index < total]


def _arange(total: int, count: int) -> list[int]:
    """torch.arange(0, total, total / count).int(): vectors counted on from a rounded start, then the rest singly.

    Beyond some 20,000 frames an index may be one off torch's.
    """
    step = total / count
    size = math.ceil(total / step)
    index = np.arange(size)
    start = np.where(index < size // _VECTOR * _VECTOR, index // _VECTOR * _VECTOR, index)
    exact = (start * step).astype(np.float32) + (index - start) * step
    chosen: list[int] = exact.astype(np.float32).astype(np.int64).tolist()
    return chosen
