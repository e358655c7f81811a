"""Videos to patches: a file, or a list of frames, sampled, and resized frame by frame as it is decoded."""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.errors import RequestError
from .frames import DEFAULT_FPS, FrameRequest, check_frames, sample_frames
from .images import load_image
from .patches import CutPicture, clip_patches
from .reader import FramesMissing
from .request import VideoSource, VisionOptions
from .resize import SizeRequest, frame_size, image_size
from .sources import describe, readable
from .vision import ImageSettings

# what says the rate at which a list's frames were sampled, in qwen-vl-utils from 0.0.12 on and before
_LIST_RATES = ("sample_fps", "fps")


def cut_video(
    source: VideoSource, frames: FrameRequest, size: SizeRequest, settings: ImageSettings, options: VisionOptions
) -> CutPicture:
    """The patches of a video file or a list of frames.

    A file: a path, file:// URL, data: URI, bytes or, where `options` allow it, an http(s) URL. A list of frames, or an
    array [frames, height, width, 3]: taken whole, each frame anything that load_image takes. Raises RequestError.
    """
    multiple = settings.temporal_patch_size

    def cut(shown: Iterable[Image.Image | NDArray[np.uint8]], count: int, fps: float) -> CutPicture:
        # odd counts are filled up before the budget of pixels is shared
        sized = _size_rule(-(-count // multiple) * multiple, size, settings, options.video_sampling)
        patches, grid = clip_patches(shown, count, sized, settings)
        return CutPicture("video", grid, multiple / fps, patches=patches)

    if not isinstance(source, str | bytes | os.PathLike):
        fps = _listed_rate(source, frames)
        return cut(_listed(source, options), len(source), fps)
    name = describe(source, "video")
    location = readable(name, source, options.http)
    try:
        with closing(options.open_video(location)) as reader:
            for _ in range(2):
                with suppress(FramesMissing):
                    rule = options.video_sampling
                    indices, fps = sample_frames(frames, rule, reader.frames, reader.fps, multiple)
                    return cut(reader.read(indices), len(indices), fps)
            raise RequestError("frames that were counted do not come; re-encode it, or give its frames as a list")
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def _listed_rate(listed: Any, frames: FrameRequest) -> float:
    """The rate at which a list's frames were sampled. Raises RequestError for what is no list of frames."""
    if not isinstance(listed, list | tuple) and getattr(listed, "ndim", 0) != 4:
        raise RequestError(
            f"{describe(listed, 'video')}: not a video; give a path, bytes, or its frames as a list of pictures"
        )
    given = {name: value for name, value in asdict(frames).items() if value is not None}
    if unused := [name for name in given if name not in _LIST_RATES]:
        raise RequestError(f"{', '.join(unused)}: a list of frames is taken whole; shorten the list instead")
    check_frames(frames)
    return float(next((given[name] for name in _LIST_RATES if name in given), DEFAULT_FPS))


def _listed(listed: Any, options: VisionOptions) -> Iterator[Image.Image]:
    for i, frame in enumerate(listed):
        try:
            yield load_image(frame, options.http, options.picture_modes)
        except RequestError as error:
            raise RequestError(f"frame {i}: {error}") from error


def _size_rule(
    frames: int, size: SizeRequest, settings: ImageSettings, rule: str
) -> Callable[[int, int], tuple[int, int]]:
    if rule == "qwen":
        return lambda height, width: frame_size(height, width, frames, size, settings)
    if size.total_pixels is not None:
        raise RequestError("transformers' sampling has no total_pixels; use max_pixels, or the default sampling")
    return lambda height, width: image_size(height, width, size, settings)
