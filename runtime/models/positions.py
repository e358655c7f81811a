"""Where patches stand in pictures, and tokens in time, height and width."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...artifacts.errors import RequestError
from .base import Picture, VisualLimits
from .config import ModelConfig

# a step of a clip's grid, counted from its first, and the seconds between two of them, to a position on the time axis
TimeAxis = Callable[[NDArray[np.int64], float], NDArray[np.int64]]


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


def check_sizes(grids: ArrayLike, ends: Sequence[int], limits: VisualLimits) -> None:
    """Raises RequestError for a picture that is larger than the visual graph takes: whatever its engine reads of a
    table or of a segment, it reads without looking. ends: of the segments, padding included."""
    side = int(as_grids(grids, 1)[:, 1:].max(initial=0))
    longest = int(np.diff(ends, prepend=0).max(initial=0))
    for size, most, what in ((side, limits.side, "is {} patches long"), (longest, limits.longest, "has {} patches")):
        if most is not None and size > most:
            raise RequestError(
                f"a picture {what.format(f'{size:,}')}, the visual graph takes {most:,}; make it smaller, with "
                "max_pixels for instance"
            )


def by_frame(steps: NDArray[np.int64], seconds: float) -> NDArray[np.int64]:
    """The time axis of Qwen2-VL: steps, however long they took."""
    return steps


def rope_positions(
    input_ids: ArrayLike,
    pictures: Sequence[Picture],
    config: ModelConfig,
    start: int = 0,
    time_axis: TimeAxis = by_frame,
) -> tuple[NDArray[np.int64], int]:
    """Positions int64 [3, tokens] (temporal, height, width) and delta, as the checkpoints were trained with.

    Text advances all three together. A picture or clip of grid (t, h, w) spans t x h/merge x w/merge tokens whose axes
    count from the position where it begins, of a clip the first by `time_axis`; the text after it goes on behind the
    largest of all three axes: get_rope_index of Qwen's own code and of transformers 4.45 to 5.2. From 5.3 on
    transformers leaves time out of that, so that text after a long clip shares positions with it.

    delta = max + 1 - tokens, so the token that follows has position tokens + delta. To continue a conversation, give
    that number as `start` with only the new tokens and their pictures; delta then counts from the new tokens' first.

    Raises RequestError when the placeholder tokens do not match the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if ids.ndim != 1 or ids.size == 0:
        raise RequestError(f"token ids of shape {ids.shape}, expected a non-empty list")
    if start < 0:
        raise RequestError(f"start is {start}, expected the next rope position, 0 or above")
    merge = config.vision.spatial_merge_size
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    as_grids([picture.grid for picture in pictures], merge)
    waiting = {kind: iter([each for each in pictures if each.kind == kind]) for kind in kinds.values()}
    slots = np.flatnonzero(np.isin(ids, list(kinds)))
    positions = np.empty((3, ids.size), dtype=np.int64)
    done, position, used = 0, start, 0
    while used < slots.size:
        first = int(slots[used])
        token = int(ids[first])
        kind = kinds[token]
        picture = next(waiting[kind], None)
        if picture is None:
            raise RequestError(f"token {first} is a placeholder of {kind} for which no {kind} was given")
        t, h, w = picture.grid[0], picture.grid[1] // merge, picture.grid[2] // merge
        end = first + t * h * w
        if not np.array_equal(ids[first:end], np.full(t * h * w, token)):
            raise RequestError(
                f"{kind} of grid {list(picture.grid)} needs {t * h * w} placeholders from token {first} on"
            )
        positions[:, done:first] = np.arange(position, position + first - done)
        position += first - done
        axes = np.indices((t, h, w)).reshape(3, -1)
        axes[0] = time_axis(axes[0], picture.seconds)
        positions[:, first:end] = axes + position
        position += int(axes.max()) + 1
        done = end
        used += t * h * w
    for kind, left in waiting.items():
        if unused := len(list(left)):
            raise RequestError(f"{unused} {kind}(s) given without a placeholder in the prompt")
    positions[:, done:] = np.arange(position, position + ids.size - done)
    return positions, int(positions.max()) + 1 - ids.size
