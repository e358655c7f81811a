"""Videos to patches: a file, or a list of frames, sampled, and resized frame by frame as it is decoded."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict
from typing import Any

from PIL import Image

from ...artifacts.errors import RequestError
from .frames import DEFAULT_FPS, FrameRequest, check_frames, sample_frames
from .images import load_image
from .patches import Picture, clip_patches
from .reader import FramesMissing, VideoReader
from .request import VideoSource, VisionOptions
from .resize import SizeRequest, frame_size, image_size
from .sources import describe, readable
from .vision import ImageSettings

# what says the rate at which a list's frames were sampled, in qwen-vl-utils from 0.0.12 on and before
_LIST_RATES = ("sample_fps", "fps")


def cut_video(
    source: VideoSource, frames: FrameRequest, size: SizeRequest, settings: ImageSettings, options: VisionOptions
) -> Picture:
    """The patches of a video file or a list of frames.

    A file: a path, file:// URL, data: URI, bytes or, where `options` allow it, an http(s) URL. A list of frames, or an
    array [frames, height, width, 3]: taken whole, each frame anything that load_image takes. Raises RequestError.
    """
    if not isinstance(source, str | bytes | os.PathLike):
        return _listed(source, frames, size, settings, options)
    name = describe(source, "video")
    location = readable(name, source, options.http)
    try:
        with closing(options.open_video(location)) as reader:
            for _ in range(2):
                with suppress(FramesMissing):
                    return _sampled(reader, frames, size, settings, options)
            raise RequestError("frames that were counted do not come; re-encode it, or give its frames as a list")
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def _sampled(
    reader: VideoReader, frames: FrameRequest, size: SizeRequest, settings: ImageSettings, options: VisionOptions
) -> Picture:
    multiple = settings.temporal_patch_size
    indices, fps = sample_frames(frames, options.video_sampling, reader.frames, reader.fps, multiple)
    sized = _size_rule(len(indices), size, settings, options)
    cut = clip_patches(reader.read(indices), len(indices), sized, settings)
    return Picture("video", *cut, seconds_per_grid=multiple / fps)


def _listed(
    listed: Any, frames: FrameRequest, size: SizeRequest, settings: ImageSettings, options: VisionOptions
) -> Picture:
    if not isinstance(listed, list | tuple) and getattr(listed, "ndim", 0) != 4:
        raise RequestError(
            f"{describe(listed, 'video')}: not a video; give a path, bytes, or its frames as a list of pictures"
        )
    given = {name: value for name, value in asdict(frames).items() if value is not None}
    if unused := [name for name in given if name not in _LIST_RATES]:
        raise RequestError(f"{', '.join(unused)}: a list of frames is taken whole; shorten the list instead")
    check_frames(frames)
    fps = next((given[name] for name in _LIST_RATES if name in given), DEFAULT_FPS)

    def pictures() -> Iterator[Image.Image]:
        for i, frame in enumerate(listed):
            try:
                yield load_image(frame, options.http, options.picture_modes)
            except RequestError as error:
                raise RequestError(f"frame {i}: {error}") from error

    cut = clip_patches(pictures(), len(listed), _size_rule(len(listed), size, settings, options), settings)
    return Picture("video", *cut, seconds_per_grid=settings.temporal_patch_size / fps)


def _size_rule(
    frames: int, size: SizeRequest, settings: ImageSettings, options: VisionOptions
) -> Callable[[int, int], tuple[int, int]]:
    multiple = settings.temporal_patch_size
    # odd counts are filled up before the budget is shared
    padded = -(-frames // multiple) * multiple
    if options.video_sampling == "qwen":
        return lambda height, width: frame_size(height, width, padded, size, settings)
    if size.total_pixels is not None:
        raise RequestError("transformers' sampling has no total_pixels; use max_pixels, or the default sampling")
    return lambda height, width: image_size(height, width, size, settings)
