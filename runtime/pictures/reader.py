"""What decodes a video: the part that a hardware decoder may take."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


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
