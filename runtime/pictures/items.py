"""A request's pictures and clips to patches, each opened once."""

from ...artifacts.errors import RequestError
from .images import load_image
from .patches import CutPicture, image_patches
from .request import VisionItem, VisionOptions, bounds_of
from .video import cut_video
from .vision import ImageSettings


def cut_item(item: VisionItem, settings: ImageSettings, options: VisionOptions) -> CutPicture:
    """The one pass from a source to its patches. Raises RequestError that starts with the item's place."""
    try:
        if isinstance(item.source, CutPicture):
            if item.source.kind != item.kind:
                raise RequestError(f"its patches are of kind {item.source.kind}, expected {item.kind}")
            return item.source
        size, settings = bounds_of(item, settings, options)
        if item.kind == "video":
            return cut_video(item.source, item.frames, size, settings, options)
        image = load_image(item.source, options.http, options.picture_modes)
        patches, grid = image_patches(image, settings, size)
        return CutPicture("image", grid, patches=patches)
    except RequestError as error:
        raise RequestError(f"{item.where}: {error}") from error
