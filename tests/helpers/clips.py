"""Small videos for tests, and what decoding every one of their frames gives."""

from collections.abc import Iterable
from contextlib import suppress
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np


@lru_cache(maxsize=64)
def moving_frame(index: int, width: int, height: int) -> np.ndarray:
    """A smooth pattern that moves: rows, columns and time all differ."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 2 + 5 * index, y * 3 - 4 * index, x + y + 7 * index]
    return (127 + 110 * np.sin(np.stack(planes, -1) / 23)).astype(np.uint8)


def write_clip(
    path: Path,
    frames: int = 60,
    width: int = 160,
    height: int = 96,
    codec: str = "libx264",
    rate: int | Fraction = 24,
    times: Iterable[int] | None = None,
    period: int = 10**6,
    **options: str,
) -> Path:
    """times: pts of each frame in units of 1 / (1000 * rate) s, for a variable rate; it repeats after `period`."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", options
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000 * rate)
        for index, pts in enumerate(times or range(frames)):
            frame = av.VideoFrame.from_ndarray(moving_frame(index % period, width, height), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = pts, Fraction(1, 1000 * rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def every_frame(path: Path, skip_damaged: bool = False) -> list[np.ndarray]:
    """All frames as RGB, in order of display: what picking frames afterwards picks from."""
    with av.open(str(path)) as container:
        if skip_damaged:
            return list(_undamaged(container))
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def _undamaged(container: Any) -> Iterable[np.ndarray]:
    codec = container.streams.video[0].codec_context
    for packet in container.demux(video=0):
        with suppress(av.error.FFmpegError):
            yield from (frame.to_ndarray(format="rgb24") for frame in codec.decode(packet) if not frame.is_corrupt)
