"""Pictures and frames to uint8 patches, bit for bit as transformers' Qwen2VLImageProcessorPil before normalisation.

Rescaling and normalisation are folded into the patch embedding, so nothing here leaves the integers.
"""

import base64
import binascii
import io
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from ..artifacts.errors import ArtifactError, RequestError
from ..artifacts.schema import parse_json

ImageSource = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]

# Pillow's own threshold for a decompression bomb; kept here because a program may switch Pillow's check off
MAX_IMAGE_PIXELS = 178_956_970
# Named, so that a picture cannot reach decoders that start other programs (EPS runs Ghostscript). JPEG covers MPO.
# AVIF last: Pillow stops at the first name it was built without.
IMAGE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF", "JPEG2000", "ICO", "AVIF")
_DEFAULT_MIN_PIXELS = 56 * 56
_DEFAULT_MAX_PIXELS = 28 * 28 * 1280
_MAX_ASPECT_RATIO = 200


@dataclass(frozen=True)
class ImageSettings:
    """How pictures become patches. min_pixels and max_pixels bound the area of a resized picture or frame."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int

    @property
    def factor(self) -> int:
        """Pixels that both sides of a resized picture are a multiple of: one merge window."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x frames x rows x columns."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def image_settings_from_hf(data: bytes, where: str = "preprocessor_config.json") -> ImageSettings:
    """Read preprocessor_config.json; what it leaves out has the default of transformers' Qwen2VLImageProcessorPil.

    The pixel bounds stand in min_pixels / max_pixels, or in size.shortest_edge / size.longest_edge (which mean the same
    here); where both are given the former win, as in transformers. Raises ArtifactError for values that cannot be
    served.
    """
    plain = parse_json(data, where)
    if not isinstance(plain, dict):
        raise ArtifactError(f"{where}: got {type(plain).__name__}, expected an object")
    for switch in ("do_resize", "do_convert_rgb"):
        if plain.get(switch, True) is False:
            raise ArtifactError(f"{where}: {switch} is false; only true is supported")
    if plain.get("resample", Image.Resampling.BICUBIC) not in (Image.Resampling.BICUBIC, None):
        raise ArtifactError(
            f"{where}: resample is {plain['resample']!r}, expected {int(Image.Resampling.BICUBIC)} (bicubic)"
        )
    size = plain.get("size") or {}
    if not isinstance(size, dict):
        raise ArtifactError(f"{where}: size is {size!r}, expected an object with shortest_edge and longest_edge")

    def positive(name: str, *candidates: Any) -> int:
        value = next(candidate for candidate in candidates if candidate is not None)
        if type(value) is not int or value <= 0:
            raise ArtifactError(f"{where}: {name} is {value!r}, expected a positive integer")
        return value

    def bound(name: str, edge: str, default: int) -> int:
        return positive(name, plain.get(name), size.get(edge), size.get(name), default)

    if size and not {"shortest_edge", "longest_edge", "min_pixels", "max_pixels"} & size.keys():
        raise ArtifactError(
            f"{where}: size has {sorted(size)}, expected shortest_edge and longest_edge (in pixels of area)"
        )
    settings = ImageSettings(
        min_pixels=bound("min_pixels", "shortest_edge", _DEFAULT_MIN_PIXELS),
        max_pixels=bound("max_pixels", "longest_edge", _DEFAULT_MAX_PIXELS),
        patch_size=positive("patch_size", plain.get("patch_size"), 14),
        temporal_patch_size=positive("temporal_patch_size", plain.get("temporal_patch_size"), 2),
        merge_size=positive("merge_size", plain.get("merge_size"), 2),
    )
    if settings.min_pixels > settings.max_pixels:
        raise ArtifactError(f"{where}: min_pixels {settings.min_pixels} is above max_pixels {settings.max_pixels}")
    return settings


def describe_image(source: object) -> str:
    """How an error names a picture: its path, or what kind of thing was given."""
    if isinstance(source, str) and source.startswith("data:"):
        return "data: URI"
    if isinstance(source, str | os.PathLike):
        return os.fspath(source) or "image path ''"
    if isinstance(source, bytes):
        return f"image of {len(source)} bytes"
    if isinstance(source, Image.Image):
        return f"PIL image {getattr(source, 'filename', '') or source.size}"
    if isinstance(source, np.ndarray):
        return f"array {source.dtype}{list(source.shape)}"
    return type(source).__name__


def load_image(source: ImageSource) -> Image.Image:
    """Open a picture as RGB, each kind of source as transformers 5.23 treats it.

    A path, file:// URL, data: URI or bytes: EXIF orientation applied, transparency dropped (image_utils.load_image).
    A PIL image: transparency laid over white, orientation left to the caller (image_transforms.convert_to_rgb).
    An array, uint8 [height, width, 3]: as is.

    Raises RequestError naming the source when it is missing, no picture, damaged, empty, too large or an http(s) URL.
    """
    name = describe_image(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise RequestError(f"{name}: expected a uint8 array [height, width, 3]")
        _check_area(name, source.shape[1], source.shape[0])
        return Image.fromarray(np.ascontiguousarray(source))
    if isinstance(source, Image.Image):
        _check_area(name, *source.size)
        return _decode(name, source, _over_white)
    if not isinstance(source, str | bytes | os.PathLike):
        raise RequestError(f"{name}: not an image; give a path, bytes, a PIL image or a uint8 array [height, width, 3]")
    readable = io.BytesIO(source) if isinstance(source, bytes) else _readable(name, os.fspath(source))
    try:
        opened = Image.open(readable, formats=IMAGE_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise RequestError(f"{name}: too large: {error}") from error
    except Exception as error:  # decoders raise whatever damaged bytes make them raise
        raise RequestError(f"{name}: not a picture that can be read; readable: {', '.join(IMAGE_FORMATS)}") from error
    with opened:
        _check_area(name, *opened.size)
        return _decode(name, opened, lambda image: ImageOps.exif_transpose(image).convert("RGB"))


def _readable(name: str, location: str) -> str | io.BytesIO:
    """A local path, or the bytes inside a data: URI."""
    scheme = location.partition(":")[0].lower()
    if scheme in ("http", "https"):
        raise RequestError(f"{name}: pictures are not fetched from the network; download it and give its path")
    if scheme == "data":
        try:
            return io.BytesIO(base64.b64decode(location.partition(",")[2], validate=True))
        except binascii.Error as error:
            raise RequestError(f"{name}: not valid base64: {error}") from error
    if scheme == "file":
        url = urlsplit(location)
        if url.netloc not in ("", "localhost"):
            raise RequestError(f"{name}: names the host {url.netloc!r}; write file:///absolute/path")
        location = unquote(url.path)
    try:
        mode = os.stat(location).st_mode
    except (OSError, ValueError) as error:
        raise RequestError(f"{name}: cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    # a pipe would block and a folder fails with a riddle
    if not stat.S_ISREG(mode):
        raise RequestError(f"{name}: not a file")
    return location


def _check_area(name: str, width: int, height: int) -> None:
    if width <= 0 or height <= 0:
        raise RequestError(f"{name}: has no pixels ({width} x {height})")
    if width * height > MAX_IMAGE_PIXELS:
        raise RequestError(f"{name}: {width} x {height} pixels, at most {MAX_IMAGE_PIXELS} in all; scale it down first")


def _decode(name: str, image: Image.Image, to_rgb: Any) -> Image.Image:
    try:
        rgb: Image.Image = to_rgb(image)
    except Exception as error:  # as above: the pixels are decoded only now
        raise RequestError(f"{name}: damaged or cut off: {error}") from error
    return rgb


def _over_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
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


def _target_size(
    image: Image.Image, settings: ImageSettings, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    least = settings.min_pixels if min_pixels is None else min_pixels
    most = settings.max_pixels if max_pixels is None else max_pixels
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        if type(value) is not int or not 0 < value <= MAX_IMAGE_PIXELS:
            raise RequestError(f"{name} is {value!r}, expected an integer from 1 to {MAX_IMAGE_PIXELS}")
    if least > most:
        raise RequestError(f"min_pixels {least} is above max_pixels {most}; give both with the image")
    return smart_resize(image.height, image.width, settings.factor, least, most)


def _patchify(frames: NDArray[np.uint8], settings: ImageSettings) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
    """Cut frames [frames, height, width, 3] into patches [n, patch_dim] in merge-window order, and their (t, h, w)."""
    patch, merge, temporal = settings.patch_size, settings.merge_size, settings.temporal_patch_size
    count, height, width, channels = frames.shape
    t, h, w = count // temporal, height // patch, width // patch
    windows = frames.reshape(t, temporal, h // merge, merge, patch, w // merge, merge, patch, channels)
    # (t, window row, window column, row in window, column in window | channel, frame, row, column)
    ordered = windows.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(ordered).reshape(t * h * w, settings.patch_dim), (t, h, w)


def image_patches(
    image: Image.Image, settings: ImageSettings, min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
    """Resize one picture and cut it: patches uint8 [n, 3 * temporal * patch * patch], grid (1, h, w) in patches.

    A picture is a clip of temporal_patch_size equal frames. Raises RequestError (see smart_resize).
    """
    rows, columns = _target_size(image, settings, min_pixels, max_pixels)
    resized = np.asarray(load_image(image).resize((columns, rows), Image.Resampling.BICUBIC))
    frames = np.broadcast_to(resized, (settings.temporal_patch_size, *resized.shape))
    return _patchify(frames, settings)


def video_patches(
    frames: Sequence[ImageSource],
    settings: ImageSettings,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[NDArray[np.uint8], tuple[int, int, int]]:
    """Resize the frames of one clip and cut them: patches uint8 [n, patch_dim], grid (t, h, w).

    The last frame is repeated until temporal_patch_size divides the count, as transformers' video processor does; the
    bounds hold for each frame. Raises RequestError for no frames or frames of different sizes.
    """
    if len(frames) == 0:
        raise RequestError("video: has no frames")
    images = [load_image(frame) for frame in frames]
    for i, image in enumerate(images):
        if image.size != images[0].size:
            raise RequestError(
                f"video: frame {i} is {image.size}, frame 0 is {images[0].size}; frames must have one size"
            )
    rows, columns = _target_size(images[0], settings, min_pixels, max_pixels)
    resized = [np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)) for image in images]
    resized += resized[-1:] * (-len(resized) % settings.temporal_patch_size)
    return _patchify(np.stack(resized), settings)


def as_grids(grids: ArrayLike, merge_size: int) -> NDArray[np.int64]:
    """Check and return grids as int64 [pictures and clips, 3]; each row (t, h, w) counts patches.

    Raises RequestError when a size is not positive or a merge window does not fit.
    """
    rows = np.asarray(grids, dtype=np.int64).reshape(-1, 3)
    for row in rows.tolist():
        if min(row) <= 0 or row[1] % merge_size or row[2] % merge_size:
            raise RequestError(f"grid {row}: expected positive t, h, w with h and w multiples of {merge_size}")
    return rows


def _window_order(height: int, width: int, merge_size: int) -> Iterator[NDArray[np.int64]]:
    for index in np.indices((height, width), dtype=np.int64):
        windows = index.reshape(height // merge_size, merge_size, width // merge_size, merge_size)
        yield windows.swapaxes(1, 2).ravel()


def vision_positions(grids: ArrayLike, merge_size: int) -> NDArray[np.int64]:
    """Row and column of every patch, [2, n], in the order of the patches (transformers' get_vision_position_ids)."""
    parts = [
        np.tile(np.stack([*_window_order(h, w, merge_size)]), t) for t, h, w in as_grids(grids, merge_size).tolist()
    ]
    return np.concatenate(parts, axis=1) if parts else np.empty((2, 0), dtype=np.int64)


def segment_ends(grids: ArrayLike) -> list[int]:
    """Where each attention segment ends: cumulative patches, one segment per picture or per temporal patch of a clip.

    transformers' get_vision_cu_seqlens without its leading 0.
    """
    rows = as_grids(grids, 1)
    ends: list[int] = np.cumsum(np.repeat(rows[:, 1] * rows[:, 2], rows[:, 0])).tolist()
    return ends
