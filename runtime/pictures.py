"""A request's pictures and clips to patches: options of the whole request, and one item at a time."""

from dataclasses import dataclass, replace

from ..artifacts.errors import RequestError
from .frames import SAMPLING_RULES
from .images import load_image
from .messages import VisionItem
from .patches import Grid, Patches, image_patches
from .sources import LOCAL_ONLY, HttpLimits
from .video import OpenVideo, VideoRequest, video_patches
from .video_av import AvReader
from .vision import ImageSettings


@dataclass(frozen=True)
class VisionOptions:
    """How a request's pictures and videos are read, where its messages do not say.

    min_pixels, max_pixels: area of a resized picture or frame. video_sampling: "qwen" samples and sizes videos as
    qwen-vl-utils does, "transformers" as its Qwen2-VL video processor. http: what may be fetched from http(s) URLs.
    open_video: the decoder. Raises RequestError for an unknown sampling.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_sampling: str = "qwen"
    http: HttpLimits = LOCAL_ONLY
    open_video: OpenVideo = AvReader

    def __post_init__(self) -> None:
        if self.video_sampling not in SAMPLING_RULES:
            raise RequestError(f"video sampling {self.video_sampling!r}: expected {' or '.join(SAMPLING_RULES)}")


DEFAULT_VISION = VisionOptions()


def item_patches(item: VisionItem, settings: ImageSettings, options: VisionOptions) -> tuple[Patches, Grid]:
    """Patches uint8 [n, patch_dim] and grid (t, h, w). Raises RequestError that starts with the item's place."""
    size = item.size
    if size.min_pixels is None and size.max_pixels is None:
        size = replace(size, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    try:
        if item.kind == "image":
            return image_patches(load_image(item.source, options.http), settings, size)
        wanted = VideoRequest(item.frames, size, options.video_sampling)
        return video_patches(item.source, settings, wanted, options.http, options.open_video)
    except RequestError as error:
        raise RequestError(f"{item.where}: {error}") from error
