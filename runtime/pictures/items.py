"""A request's pictures and clips to patches: options of the whole request, and one item at a time."""

from dataclasses import dataclass, replace

from ...artifacts.errors import RequestError
from ..text.messages import VisionItem
from .frames import SAMPLING_RULES
from .images import load_image
from .modes import PICTURE_MODES
from .patches import Grid, Patches, image_patches
from .resize import SizeRequest, check_bounds
from .sources import LOCAL_ONLY, HttpLimits
from .video import OpenVideo, VideoRequest, video_patches
from .video_av import AvReader
from .vision import ImageSettings


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


def item_patches(item: VisionItem, settings: ImageSettings, options: VisionOptions) -> tuple[Patches, Grid]:
    """Patches uint8 [n, patch_dim] and grid (t, h, w). Raises RequestError that starts with the item's place."""
    settings = replace(settings, **_bounds(item.size, settings, options))
    try:
        if item.kind == "image":
            return image_patches(load_image(item.source, options.http, options.picture_modes), settings, item.size)
        size = item.size
        if options.video_sampling == "qwen":
            # the options stand for what the message leaves out: a frame has 128 merge windows at least otherwise
            given = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
            size = replace(size, **{name: each for name, each in given.items() if getattr(size, name) is None})
        wanted = VideoRequest(item.frames, size, options.video_sampling, options.picture_modes)
        return video_patches(item.source, settings, wanted, options.http, options.open_video)
    except RequestError as error:
        raise RequestError(f"{item.where}: {error}") from error


def _bounds(size: SizeRequest, settings: ImageSettings, options: VisionOptions) -> dict[str, int]:
    """The processor's bounds: the options' in place of the checkpoint's, or the wider ones where a message has any."""
    least, most = options.min_pixels, options.max_pixels
    found = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    if least is not None:
        found["min_pixels"] = least if size.min_pixels is None else min(least, settings.min_pixels)
    if most is not None:
        found["max_pixels"] = most if size.max_pixels is None else max(most, settings.max_pixels)
    return found
