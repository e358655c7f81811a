"""Pixels to patches: resized pictures and frames cut into uint8 patches in the model's merge-window order."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...artifacts.errors import RequestError
from ..models.base import Picture
from .resize import SizeRequest, image_size, resized_bands
from .vision import ImageSettings

Kind = Literal["image", "video"]
Grid = tuple[int, int, int]
Patches = NDArray[np.uint8]
# four times what qwen-vl-utils' pixel budget lets a video have; more would fill memory before the model refuses it
MAX_PATCH_BYTES = 1 << 31


@dataclass(frozen=True, eq=False)
class CutPicture(Picture):
    """A picture or clip that was cut: all that later stages know of it. May stand in a message as its source.

    patches uint8 [t * h * w, patch_dim], counted by its grid. seconds: temporal_patch_size over the rate of its frames
    (transformers' second_per_grid_ts).
    """

    patches: Patches = field(kw_only=True)

    def tokens(self, merge_size: int) -> int:
        """How many tokens of a prompt it takes: one a merge window."""
        t, h, w = self.grid
        return t * h * w // merge_size**2

    def same(self, other: "CutPicture") -> bool:
        facts, others = ((p.kind, p.grid, p.seconds) for p in (self, other))
        return facts == others and np.array_equal(self.patches, other.patches)


class PatchGrid:
    """The patches of one picture or clip while they are written, frame by frame."""

    def __init__(self, frames: int, height: int, width: int, settings: ImageSettings) -> None:
        """frames of height x width pixels, multiples of settings.factor. Raises RequestError above MAX_PATCH_BYTES.

        The last frame is repeated until temporal_patch_size divides the count, as transformers' video processor does.
        """
        self._settings = settings
        self._frames = frames
        self._size = height, width
        patch, merge = settings.patch_size, settings.merge_size
        self.grid: Grid = (-(-frames // settings.temporal_patch_size), height // patch, width // patch)
        size = self.grid[0] * settings.temporal_patch_size * height * width * 3
        if size > MAX_PATCH_BYTES:
            raise RequestError(
                f"{frames} frames of {width} x {height} pixels make {size / 2**30:.1f} GiB of patches, at most "
                f"{MAX_PATCH_BYTES / 2**30:.0f}; lower fps, nframes or max_pixels"
            )
        # a row of a patch moves as one item: numpy copies 14 single bytes three times slower
        self._row = np.dtype(f"V{patch}")
        windows = (height // settings.factor, width // settings.factor)
        shape = (self.grid[0], *windows, merge, merge, 3, settings.temporal_patch_size, patch)
        # uint8 [t * h * w, 3 * temporal_patch_size * patch_size**2], rows by window, then by patch in the window
        self.patches: Patches = np.empty((size // settings.patch_dim, settings.patch_dim), np.uint8)
        self._rows = self.patches.view(self._row).reshape(shape)

    def write(self, index: int, pixels: Image.Image | NDArray[np.uint8]) -> None:
        """Resize and cut frame `index`, RGB or uint8 [rows, columns, 3]; the last one also fills what is behind it."""
        patch, merge, factor = self._settings.patch_size, self._settings.merge_size, self._settings.factor
        t, k = divmod(index, self._settings.temporal_patch_size)
        target = self._rows[t]
        for x, band in resized_bands(pixels, *self._size, factor):
            planes = np.ascontiguousarray(band.transpose(2, 0, 1)).view(self._row)
            # [channel, window row, row in window, row in patch, window column, column in window]
            planes = planes.reshape(3, len(target), merge, patch, -1, merge)
            windows = slice(x // factor, x // factor + planes.shape[4])
            target[:, windows, ..., k, :] = planes.transpose(1, 4, 2, 5, 0, 3)
        if index == self._frames - 1:
            target[..., k + 1 :, :] = target[..., k : k + 1, :]


def image_patches(
    image: Image.Image, settings: ImageSettings, wanted: SizeRequest | None = None
) -> tuple[Patches, Grid]:
    """Resize an RGB picture and cut it: patches uint8 [n, patch_dim] and its grid (1, h, w) in patches.

    A picture is a clip of temporal_patch_size equal frames. Raises RequestError (see image_size).
    """
    size = wanted or SizeRequest()
    return clip_patches((image,), 1, lambda height, width: image_size(height, width, size, settings), settings)


def clip_patches(
    frames: Iterable[Image.Image | NDArray[np.uint8]],
    count: int,
    size: Callable[[int, int], tuple[int, int]],
    settings: ImageSettings,
) -> tuple[Patches, Grid]:
    """Resize and cut `count` frames as they come, RGB or uint8 [height, width, 3]: patches and their grid (t, h, w).

    size(height, width) says what the first frame, and so all of them, is resized to. Raises RequestError for frames of
    different sizes.
    """
    cut: PatchGrid | None = None
    first = (0, 0)
    for i, frame in enumerate(frames):
        shape = (frame.height, frame.width) if isinstance(frame, Image.Image) else frame.shape[:2]
        if cut is None:
            first = shape
            cut = PatchGrid(count, *size(*shape), settings)
        if shape != first:
            raise RequestError(
                f"frame {i} is {shape[1]} x {shape[0]}, frame 0 is {first[1]} x {first[0]}; frames must have one size"
            )
        cut.write(i, frame)
    if cut is None:
        raise RequestError("has no frames")
    if i + 1 != count:
        raise RequestError(f"ended after {i + 1} of {count} frames")
    return cut.patches, cut.grid
