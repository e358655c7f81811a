"""How large a picture or frame becomes, and making it so: bit for bit torch's antialiased bicubic on uint8.

That is the resize of transformers' default processors and of qwen-vl-utils' videos. It runs in cykooz.resizer, which is
as fast and takes no second to import; torch does it where that has no wheel.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.errors import MissingDependencyError, RequestError
from ...artifacts.host.process import prepare_process
from .frames import MOST
from .images import MAX_IMAGE_PIXELS
from .vision import ImageSettings

_MAX_ASPECT_RATIO = 200
_PIECE_BYTES = 1 << 20
# qwen-vl-utils 0.0.14, vision_process.py: merge windows of a picture, of one frame, and of all frames of a video
_IMAGE_MIN_TOKENS, _IMAGE_MAX_TOKENS = 4, 16384
_FRAME_MIN_TOKENS, _FRAME_MAX_TOKENS = 128, 768
_VIDEO_TOKENS = 128_000 * 0.9

# (pixels uint8 [height, width, 3] as bytes, width, height, new width, new height), of which one changes, to pixels
Pass = Callable[[bytes, int, int, int, int], bytes]


@dataclass(frozen=True)
class SizeRequest:
    """What a request says of a picture's or clip's size, as qwen-vl-utils takes it; None leaves it to the settings.

    min_pixels and max_pixels bound the area of a resized picture or frame, total_pixels that of all frames of a clip
    together. resized_height and resized_width (both) replace the size of the source. The settings' own bounds hold
    for whatever comes of it.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """The (height, width) a picture is resized to: multiples of factor, area within bounds, aspect ratio about kept.

    The formula, Python's round-half-even included, is that of transformers' smart_resize. Very long pictures may exceed
    max_pixels, since no side gets shorter than factor. Raises RequestError for empty or too long pictures.
    """
    if height <= 0 or width <= 0:
        raise RequestError(f"image of {width} x {height} pixels: has no pixels")
    ratio = max(height, width) / min(height, width)
    if ratio > _MAX_ASPECT_RATIO:
        raise RequestError(
            f"image of {width} x {height} pixels: aspect ratio {ratio:.1f}, at most {_MAX_ASPECT_RATIO}; crop it first"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def image_size(height: int, width: int, wanted: SizeRequest, settings: ImageSettings) -> tuple[int, int]:
    """The (height, width) that a picture is resized to.

    What the request says comes first, by qwen-vl-utils' fetch_image, then the processor's own bounds: a message may ask
    for less than those allow, not for more. Raises RequestError for sizes and bounds that make no sense.
    """
    area = settings.factor**2
    given = _given_size(wanted)
    least = _pixels("min_pixels", wanted.min_pixels, _IMAGE_MIN_TOKENS * area)
    most = _pixels("max_pixels", wanted.max_pixels, _IMAGE_MAX_TOKENS * area)
    _check_order(least, most)
    if given is not None:
        # fetch_image looks at no bounds beside them
        height, width = given
    elif wanted.min_pixels is not None or wanted.max_pixels is not None:
        height, width = smart_resize(height, width, settings.factor, least, most)
    return _processor_size(height, width, settings)


def frame_size(height: int, width: int, frames: int, wanted: SizeRequest, settings: ImageSettings) -> tuple[int, int]:
    """The (height, width) that each of a clip's frames is resized to: by qwen-vl-utils' fetch_video, which shares the
    clip's pixel budget between the pairs of frames, then the processor's own bounds.

    Raises RequestError as image_size does.
    """
    area = settings.factor**2
    budget = _pixels("total_pixels", wanted.total_pixels, _VIDEO_TOKENS * area, most=MOST)
    if _given_size(wanted) is not None:
        return image_size(height, width, wanted, settings)
    least = _pixels("min_pixels", wanted.min_pixels, _FRAME_MIN_TOKENS * area)
    limit = max(min(_FRAME_MAX_TOKENS * area, budget / frames * settings.temporal_patch_size), int(least * 1.05))
    most = min(_pixels("max_pixels", wanted.max_pixels, limit), limit)
    _check_order(least, most)
    return _processor_size(*smart_resize(height, width, settings.factor, least, most), settings)


def _processor_size(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    _check_order(settings.min_pixels, settings.max_pixels)
    return smart_resize(height, width, settings.factor, settings.min_pixels, settings.max_pixels)


def check_bounds(least: Any, most: Any) -> None:
    """Raises RequestError for a min_pixels and max_pixels, None where not given, that make no sense."""
    _check_order(_pixels("min_pixels", least, 1), _pixels("max_pixels", most, MAX_IMAGE_PIXELS))


def _pixels(name: str, value: Any, default: float, most: int = MAX_IMAGE_PIXELS) -> float:
    if value is None:
        return default
    if type(value) is not int or value <= 0:
        raise RequestError(f"{name} is {value!r}, expected an integer from 1 to {most}")
    if value > most:
        # not shown: Python refuses to print integers of thousands of digits
        raise RequestError(f"{name} is above {most}")
    return value


def _check_order(least: float, most: float) -> None:
    if least > most:
        raise RequestError(f"min_pixels {least} is above max_pixels {most:g}; give both with the image or video")


def _given_size(wanted: SizeRequest) -> tuple[int, int] | None:
    height, width = wanted.resized_height, wanted.resized_width
    if height is None and width is None:
        return None
    if type(height) is not int or type(width) is not int or min(height, width) <= 0:
        raise RequestError(f"resized_height, resized_width are {height!r}, {width!r}; expected two positive integers")
    if max(height, width) > MOST:
        raise RequestError(f"resized_height or resized_width is above {MOST}")
    return height, width


def resize(pixels: Image.Image | NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """An RGB picture, or uint8 [rows, columns, 3], as uint8 [height, width, 3]; what fits already keeps its bits.

    Columns first, rounded to uint8, then rows, as torch.nn.functional.interpolate(mode="bicubic", antialias=True) does.
    """
    return np.concatenate([band for _, band in resized_bands(pixels, height, width, 1)], axis=1)


def resized_bands(
    pixels: Image.Image | NDArray[np.uint8], height: int, width: int, multiple: int
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """What resize returns, as bands of columns [height, columns, 3] behind their first column, each in `multiple`s.

    Never holds more than small pieces beside the picture: larger ones would leave the cache, and go back to the system
    and be asked for again with every picture, at twice the time.
    """
    rows, columns = (pixels.height, pixels.width) if isinstance(pixels, Image.Image) else pixels.shape[:2]
    step = max(1, _PIECE_BYTES // (3 * columns))
    strips = []
    for start in range(0, rows, step):
        count = min(step, rows - start)
        strip = _strip(pixels, start, count)
        if columns != width:
            strip = _engine()(strip, columns, count, width, count)
        strips.append(np.frombuffer(strip, np.uint8).reshape(count, width, 3))
    step = max(1, _PIECE_BYTES // (3 * max(rows, height) * multiple)) * multiple
    for x in range(0, width, step):
        band = np.concatenate([strip[:, x : x + step] for strip in strips])
        if rows != height:
            data = _engine()(band.tobytes(), band.shape[1], rows, band.shape[1], height)
            band = np.frombuffer(data, np.uint8).reshape(height, -1, 3)
        yield x, band


def _strip(pixels: Image.Image | NDArray[np.uint8], start: int, count: int) -> bytes:
    if isinstance(pixels, Image.Image):
        return pixels.crop((0, start, pixels.width, start + count)).tobytes()
    return pixels[start : start + count].tobytes()


@cache
def _engine() -> Pass:
    if find_spec("cykooz_resizer") is not None:
        return _cykooz_pass()
    if find_spec("torch") is not None:
        prepare_process()
        from ..backends.resize import torch_pass

        return torch_pass
    raise MissingDependencyError("resizing pictures needs cykooz.resizer (x86-64) or torch; pip install cykooz.resizer")


def _cykooz_pass() -> Pass:
    from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer

    # Catmull-Rom is the bicubic with a = -0.5 that torch and Pillow use when they antialias
    options = ResizeOptions(resize_alg=ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False)

    def one_pass(data: bytes, width: int, height: int, new_width: int, new_height: int) -> bytes:
        resized = ImageData(new_width, new_height, PixelType.U8x3)
        Resizer().resize(ImageData(width, height, PixelType.U8x3, data), resized, options)
        made: bytes = resized.get_buffer()
        return made

    return one_pass
