"""A request's pictures and clips to patches: options of the whole request, and one item at a time."""

from dataclasses import dataclass, replace

from ..artifacts.errors import RequestError
from .frames import SAMPLING_RULES
from .images import load_image
from .messages import VisionItem
from .patches import Grid, Patches, image_patches
from .resize import check_bounds
from .sources import LOCAL_ONLY, HttpLimits
from .video import OpenVideo, VideoRequest, video_patches
from .video_av import AvReader
from .vision import ImageSettings


@dataclass(frozen=True)
class VisionOptions:
    """How a request's pictures and videos are read, where its messages do not say.

    min_pixels, max_pixels: area of a resized picture or frame; they bound resized_height x resized_width too.
    video_sampling: "qwen" samples and sizes videos as qwen-vl-utils does, "transformers" as its Qwen2-VL processor.
    http: what may be fetched from http(s) URLs. open_video: the decoder.

    Raises RequestError for an unknown sampling and for bounds that make no sense.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_sampling: str = "qwen"
    http: HttpLimits = LOCAL_ONLY
    open_video: OpenVideo = AvReader

    def __post_init__(self) -> None:
        if self.video_sampling not in SAMPLING_RULES:
            raise RequestError(f"video sampling {self.video_sampling!r}: expected {' or '.join(SAMPLING_RULES)}")
        check_bounds(self.min_pixels, self.max_pixels)


DEFAULT_VISION = VisionOptions()


def item_patches(item: VisionItem, settings: ImageSettings, options: VisionOptions) -> tuple[Patches, Grid]:
    """Patches uint8 [n, patch_dim] and grid (t, h, w). Raises RequestError that starts with the item's place."""
    bounds = {"min_pixels": options.min_pixels, "max_pixels": options.max_pixels}
    size = replace(item.size, **{name: each for name, each in bounds.items() if getattr(item.size, name) is None})
    # the settings' bounds are those of resized_height and resized_width
    settings = replace(settings, **{name: each for name, each in bounds.items() if each is not None})
    try:
        if item.kind == "image":
            return image_patches(load_image(item.source, options.http), settings, size)
        wanted = VideoRequest(item.frames, size, options.video_sampling)
        return video_patches(item.source, settings, wanted, options.http, options.open_video)
    except RequestError as error:
        raise RequestError(f"{item.where}: {error}") from error
