"""Pictures of every Pillow mode to RGB: as a viewer shows them, or with the bits that transformers makes of them."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.errors import RequestError

PICTURE_MODES = ("viewer", "transformers")

# file formats whose samples of more than 8 bits Pillow brings to 16 bits, whatever values occur
_FORMATS_OF_16_BITS = ("PNG", "PPM")
# how far the values of a picture that was resized or sharpened may lie outside their range, as a part of it
_OVERSHOOT = 0.5


def to_rgb(image: Image.Image, rule: str, is_file: bool) -> Image.Image:
    """The picture as RGB, itself if it is that already; rule: one of PICTURE_MODES.

    "viewer": what is transparent shows white, as in qwen-vl-utils' to_rgb (which does so for RGBA only); 16 bits are
    scaled to 8; floats are taken for 0..1 or 0..255, and 32-bit integers for 8 or 16 bits, by the values that occur.
    "transformers": a file's transparency is dropped (image_utils.load_image), a PIL image's shows white
    (image_transforms.convert_to_rgb); what exceeds 8 bits is cut off at 255.

    Raises RequestError for floats and integers of another range.
    """
    # of a file, nothing was decoded before
    image.load()
    clear = image.info.get("transparency")
    if image.mode == "RGB" and clear is None:
        return image
    if rule == "transformers":
        shows_white = not is_file and ("A" in image.getbands() or clear is not None)
        return _over_white(image.convert("RGBA")) if shows_white else image.convert("RGB")
    if image.mode.startswith("I"):
        return _integers(image)
    if image.mode == "F":
        return _floats(image)
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # a file's 16 bits: Pillow cuts the pixels to their upper half, but not the colour that stands for nothing
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode == "La":
        # premultiplied, which Pillow takes back for its other half only
        image = image.convert("LA")
    return _over_white(image.convert("RGBA")) if image.has_transparency_data else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _integers(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    lowest, highest = int(pixels.min()), int(pixels.max())
    if lowest < 0 or highest > 65535:
        raise RequestError(f"integers from {lowest} to {highest}, expected 8 or 16 bits; scale them to 0..255 first")
    is_wide = image.mode != "I" or image.format in _FORMATS_OF_16_BITS or highest > 255
    # v / 257 to the nearest; looked up, since products of a large picture would take gigabytes
    grey = ((np.arange(65536) + 128) // 257).astype(np.uint8)[pixels] if is_wide else pixels.astype(np.uint8)
    clear = image.info.get("transparency")
    return _grey(np.where(pixels == clear, np.uint8(255), grey) if isinstance(clear, int) else grey)


def _floats(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    lowest, highest = float(pixels.min()), float(pixels.max())
    for scale in (1.0, 255.0):
        margin = _OVERSHOOT * min(scale, 1.0)
        if lowest >= -margin and highest <= scale + margin:
            return _grey(np.rint(np.clip(pixels * (255 / scale), 0, 255)).astype(np.uint8))
    raise RequestError(f"floats from {lowest:g} to {highest:g}, expected 0 to 1 or 0 to 255; scale them first")


def _grey(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels).convert("RGB")
