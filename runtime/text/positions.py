"""M-RoPE positions: where each token of a prompt stands in time, height and width."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...artifacts.config import ModelConfig
from ...artifacts.errors import RequestError
from ..pictures.vision import as_grids


def rope_positions(
    input_ids: ArrayLike,
    image_grids: ArrayLike,
    video_grids: ArrayLike,
    config: ModelConfig,
    start: int = 0,
) -> tuple[NDArray[np.int64], int]:
    """Positions int64 [3, tokens] (temporal, height, width) and delta, as the checkpoints were trained with.

    Text advances all three together. A picture or clip of grid (t, h, w) spans t x h/merge x w/merge tokens whose axes
    count from the position where it begins; the text after it goes on behind the largest of all three axes, that is
    max(t, h/merge, w/merge) later: get_rope_index of Qwen2-VL's own code and of transformers 4.45 to 5.2. From 5.3 on
    transformers leaves t out of that, so that text after a long clip shares positions with it.

    delta = max + 1 - tokens, so the token that follows has position tokens + delta. To continue a conversation, give
    that number as `start` with only the new tokens and their grids; delta then counts from the new tokens' first one.

    Raises RequestError when the placeholder tokens do not match the grids.
    """
    ids = np.asarray(input_ids, dtype=np.int64)
    if ids.ndim != 1 or ids.size == 0:
        raise RequestError(f"token ids of shape {ids.shape}, expected a non-empty list")
    if start < 0:
        raise RequestError(f"start is {start}, expected the next rope position, 0 or above")
    merge = config.vision.spatial_merge_size
    kinds = {config.image_token_id: "image", config.video_token_id: "video"}
    waiting = {
        config.image_token_id: iter(as_grids(image_grids, merge).tolist()),
        config.video_token_id: iter(as_grids(video_grids, merge).tolist()),
    }
    slots = np.flatnonzero(np.isin(ids, list(kinds)))
    positions = np.empty((3, ids.size), dtype=np.int64)
    done, position, used = 0, start, 0
    while used < slots.size:
        first = int(slots[used])
        token = int(ids[first])
        grid = next(waiting[token], None)
        if grid is None:
            raise RequestError(
                f"token {first} is a placeholder of {kinds[token]} for which no {kinds[token]} was given"
            )
        t, h, w = grid[0], grid[1] // merge, grid[2] // merge
        end = first + t * h * w
        if not np.array_equal(ids[first:end], np.full(t * h * w, token)):
            raise RequestError(f"{kinds[token]} of grid {grid} needs {t * h * w} placeholders from token {first} on")
        positions[:, done:first] = np.arange(position, position + first - done)
        position += first - done
        positions[:, first:end] = np.indices((t, h, w)).reshape(3, -1) + position
        position += max(t, h, w)
        done = end
        used += t * h * w
    for token, left in waiting.items():
        if unused := len(list(left)):
            raise RequestError(f"{unused} {kinds[token]}(s) given without a placeholder in the prompt")
    positions[:, done:] = np.arange(position, position + ids.size - done)
    return positions, int(positions.max()) + 1 - ids.size
