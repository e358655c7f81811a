"""Pictures from wherever they are to upright RGB pixels."""

import os
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ...artifacts.errors import RequestError
from .modes import to_rgb
from .sources import LOCAL_ONLY, HttpLimits, describe, readable

# also any tensor that numpy can read, such as torch's: uint8 [height, width, 3] or [3, height, width]
ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

# Pillow's own threshold for a decompression bomb; kept here because a program may switch Pillow's check off
MAX_IMAGE_PIXELS = 178_956_970
# Named, so that a picture cannot reach decoders that start other programs (EPS runs Ghostscript). JPEG covers MPO.
# AVIF last: Pillow stops at the first name it was built without.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")


def load_image(source: ImageSource, http: HttpLimits = LOCAL_ONLY, modes: str = "viewer") -> Image.Image:
    """Open a picture as RGB; of an animation, the first frame. modes: see to_rgb.

    A path, file:// URL, data: URI, bytes or, where `http` allows it, an http(s) URL: EXIF orientation applied. A PIL
    image: orientation left to the caller, as in transformers. An array or tensor, uint8 [height, width, 3] or [3,
    height, width]: as is; where both fit, the latter (image_utils.infer_channel_dimension_format).

    Raises RequestError naming the source when it is missing, no picture, damaged, empty, too large or an http(s) URL
    that is not allowed or does not come.
    """
    name = describe_image(source)
    if isinstance(source, Image.Image):
        check_area(name, *source.size)
        return _decode(name, source, modes, is_file=False)
    if isinstance(source, str | bytes | os.PathLike):
        return _open(name, source, http, modes)
    if hasattr(source, "__array__"):
        return Image.fromarray(_rgb_array(name, source))
    raise RequestError(f"{name}: not an image; give a path, bytes, a PIL image or a uint8 array [height, width, 3]")


def describe_image(source: object) -> str:
    """How an error names a picture: its path, or what kind of thing was given."""
    if isinstance(source, Image.Image):
        return f"PIL image {getattr(source, 'filename', '') or source.size}"
    return describe(source, "image")


def check_area(name: str, width: int, height: int, most: int = MAX_IMAGE_PIXELS) -> None:
    """Raises RequestError for a picture or frame without pixels, or with more than any honest one has."""
    if width <= 0 or height <= 0:
        raise RequestError(f"{name}: has no pixels ({width} x {height})")
    if width * height > most:
        raise RequestError(f"{name}: {width} x {height} pixels, at most {most} in all; scale it down first")


def _open(name: str, source: str | bytes | os.PathLike[str], http: HttpLimits, modes: str) -> Image.Image:
    location = readable(name, source, http)
    try:
        with warnings.catch_warnings():
            # check_area is the limit; half of it makes Pillow write to the terminal
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(location, formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise RequestError(f"{name}: too large: {error}") from error
    except Exception as error:  # decoders raise whatever damaged bytes make them raise
        raise RequestError(f"{name}: not a picture that can be read; readable: {', '.join(IMAGE_FORMATS)}") from error
    with opened:
        check_area(name, *opened.size)
        return _decode(name, opened, modes, is_file=True)


def _decode(name: str, image: Image.Image, modes: str, is_file: bool) -> Image.Image:
    try:
        if is_file:
            # in place and without a copy of what is RGB: a picture of 10,000 x 10,000 takes 400 MB each time
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image, modes, is_file)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error
    except Exception as error:  # as above: the pixels are decoded only now
        raise RequestError(f"{name}: damaged or cut off: {error}") from error


def _rgb_array(name: str, source: Any) -> NDArray[np.uint8]:
    try:
        pixels = np.asarray(source)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a device, or one that needs a gradient
        raise RequestError(f"{name}: numpy cannot read it: {error}") from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise RequestError(f"{name}: expected a uint8 array [height, width, 3] or [3, height, width]")
    if pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    check_area(name, pixels.shape[1], pixels.shape[0])
    return np.ascontiguousarray(pixels)
