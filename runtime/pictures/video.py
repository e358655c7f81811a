"""Videos to patches: a file, or a list of frames, sampled, and resized frame by frame as it is decoded."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.errors import RequestError
from .frames import FrameRequest, sample_frames
from .images import ImageSource, load_image
from .patches import Grid, Patches, clip_patches
from .resize import SizeRequest, frame_size, image_size
from .sources import HttpLimits, describe, readable
from .vision import ImageSettings

VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource]


class FramesMissing(Exception):
    """A file's times or key frames misled the decoder; it has counted the frames again, by decoding all of them."""


class VideoReader(Protocol):
    """An opened video. What a hardware decoder implements to take the place of the one in video_av.

    frames: how many can be shown. fps: their mean rate.
    """

    frames: int
    fps: float

    def read(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Frames by ascending index in order of display, upright RGB, uint8 [height, width, 3].

        Raises FramesMissing when some did not come: `frames` is right now, and the caller samples and reads again.
        Raises RequestError when nothing can be decoded.
        """
        ...

    def close(self) -> None: ...


# takes a path or the file's bytes; raises RequestError for what is no video
OpenVideo = Callable[[str | io.BytesIO], VideoReader]


@dataclass(frozen=True)
class VideoRequest:
    """How one video is sampled and sized; rule: one of SAMPLING_RULES. modes: see to_rgb, for a list of frames."""

    frames: FrameRequest
    size: SizeRequest
    rule: str
    modes: str = "viewer"


def video_patches(
    source: VideoSource, settings: ImageSettings, wanted: VideoRequest, http: HttpLimits, open_video: OpenVideo
) -> tuple[Patches, Grid]:
    """Patches uint8 [n, patch_dim] and grid (t, h, w) of a video file or a list of frames.

    A file: a path, file:// URL, data: URI, bytes or, where `http` allows it, an http(s) URL. A list of frames, or an
    array [frames, height, width, 3]: taken whole, each frame anything that load_image takes. Raises RequestError.
    """
    if not isinstance(source, str | bytes | os.PathLike):
        return _listed(source, settings, wanted, http)
    name = describe(source, "video")
    location = readable(name, source, http)
    try:
        with closing(open_video(location)) as reader:
            for _ in range(2):
                with suppress(FramesMissing):
                    return _sampled(reader, settings, wanted)
            raise RequestError("frames that were counted do not come; re-encode it, or give its frames as a list")
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error


def _sampled(reader: VideoReader, settings: ImageSettings, wanted: VideoRequest) -> tuple[Patches, Grid]:
    multiple = settings.temporal_patch_size
    indices = sample_frames(wanted.frames, wanted.rule, reader.frames, reader.fps, multiple)
    return clip_patches(reader.read(indices), len(indices), _size_rule(len(indices), settings, wanted), settings)


def _listed(frames: Any, settings: ImageSettings, wanted: VideoRequest, http: HttpLimits) -> tuple[Patches, Grid]:
    if not isinstance(frames, list | tuple) and getattr(frames, "ndim", 0) != 4:
        raise RequestError(
            f"{describe(frames, 'video')}: not a video; give a path, bytes, or its frames as a list of pictures"
        )
    # fps is the rate that the caller sampled at, and Qwen2-VL does not look at it
    if unused := [name for name, value in vars(wanted.frames).items() if value is not None and name != "fps"]:
        raise RequestError(f"{', '.join(unused)}: a list of frames is taken whole; shorten the list instead")

    def pictures() -> Iterator[Image.Image]:
        for i, frame in enumerate(frames):
            try:
                yield load_image(frame, http, wanted.modes)
            except RequestError as error:
                raise RequestError(f"frame {i}: {error}") from error

    return clip_patches(pictures(), len(frames), _size_rule(len(frames), settings, wanted), settings)


def _size_rule(frames: int, settings: ImageSettings, wanted: VideoRequest) -> Callable[[int, int], tuple[int, int]]:
    multiple = settings.temporal_patch_size
    # odd counts are filled up before the budget is shared
    padded = -(-frames // multiple) * multiple
    if wanted.rule == "qwen":
        return lambda height, width: frame_size(height, width, padded, wanted.size, settings)
    if wanted.size.total_pixels is not None:
        raise RequestError("transformers' sampling has no total_pixels; use max_pixels, or the default sampling")
    return lambda height, width: image_size(height, width, wanted.size, settings)
