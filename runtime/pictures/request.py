"""What a request says of its pictures and clips: one item's own words, and options that hold for all of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...artifacts.errors import RequestError
from .frames import SAMPLING_RULES, FrameRequest
from .images import ImageSource
from .modes import PICTURE_MODES
from .patches import Kind
from .reader import OpenVideo
from .resize import SizeRequest, check_bounds
from .sources import LOCAL_ONLY, HttpLimits
from .video_av import AvReader
from .vision import ImageSettings

VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource]


@dataclass(frozen=True)
class VisionItem:
    """A picture or clip of a request; source None takes the next one given beside the messages. `where` names it."""

    kind: Kind
    source: Any
    where: str
    size: SizeRequest = field(default_factory=SizeRequest)
    frames: FrameRequest = field(default_factory=FrameRequest)


@dataclass(frozen=True)
class VisionOptions:
    """How a request's pictures and videos are read, where its messages do not say.

    min_pixels, max_pixels: area of a resized picture or frame; they bound resized_height x resized_width too.
    video_sampling: "qwen" samples and sizes videos as qwen-vl-utils does, "transformers" as its Qwen2-VL processor.
    picture_modes: what becomes of transparency, 16 bits and floats: "viewer" or "transformers", see to_rgb.
    http: what may be fetched from http(s) URLs. open_video: the decoder.

    Raises RequestError for an unknown sampling or modes and for bounds that make no sense.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_sampling: str = "qwen"
    http: HttpLimits = LOCAL_ONLY
    open_video: OpenVideo = AvReader
    picture_modes: str = "viewer"

    def __post_init__(self) -> None:
        if self.video_sampling not in SAMPLING_RULES:
            raise RequestError(f"video sampling {self.video_sampling!r}: expected {' or '.join(SAMPLING_RULES)}")
        if self.picture_modes not in PICTURE_MODES:
            raise RequestError(f"picture modes {self.picture_modes!r}: expected {' or '.join(PICTURE_MODES)}")
        check_bounds(self.min_pixels, self.max_pixels)


DEFAULT_VISION = VisionOptions()


def bounds_of(item: VisionItem, settings: ImageSettings, options: VisionOptions) -> tuple[SizeRequest, ImageSettings]:
    """How large an item may become: defaults < artifact (settings) < call (options) < message (the item's own size).

    A size is found in two steps (see image_size, frame_size). What is asked for, the first result, has qwen-vl-utils'
    defaults, and for its videos those of the call. What is allowed, the second, are the call's bounds in place of the
    artifact's, or the wider of both where the message asks for one itself.
    """
    asked: dict[str, int] = {}
    allowed: dict[str, int] = {}
    for name, wider in (("min_pixels", min), ("max_pixels", max)):
        by_call, by_message = getattr(options, name), getattr(item.size, name)
        if by_call is not None:
            allowed[name] = by_call if by_message is None else wider(by_call, getattr(settings, name))
            if by_message is None and item.kind == "video" and options.video_sampling == "qwen":
                # a frame has 128 merge windows at least otherwise
                asked[name] = by_call
    return replace(item.size, **asked), replace(settings, **allowed)
