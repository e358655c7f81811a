"""Turning and mirroring a video's frames as its display matrix says."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...artifacts.errors import RequestError

# of the larger half of a matrix: phones write quarter turns exactly, other programs with some rounding
_TOLERANCE = 1 / 64


def upright(pixels: NDArray[np.uint8], matrix: Any) -> NDArray[np.uint8]:
    """A frame [height, width, 3] as it is to be shown, in one of the eight ways that quarter turns and mirrors give.

    matrix: nine int32 as bytes, (a, b, u, c, d, v, x, y, w) of ISO 14496-12, 6.2.2; the point (p, q), q downwards, is
    shown at (a p + c q, b p + d q). Its scale and place are left out. Raises RequestError for any other angle.
    """
    numbers = np.frombuffer(matrix, np.int32).astype(np.int64).tolist()
    a, b, c, d = (numbers[i] for i in (0, 1, 3, 4))
    plain, crossed = min(abs(a), abs(d)), min(abs(b), abs(c))
    if plain and max(abs(b), abs(c)) <= plain * _TOLERANCE:
        columns, rows = a, d
    elif crossed and max(abs(a), abs(d)) <= crossed * _TOLERANCE:
        pixels = pixels.swapaxes(0, 1)
        columns, rows = c, b
    else:
        raise RequestError(
            f"is shown by the matrix ({a / 65536:g}, {b / 65536:g}, {c / 65536:g}, {d / 65536:g}); only quarter turns "
            "and mirrors can be undone: re-encode it"
        )
    return np.ascontiguousarray(pixels[:: 1 if rows > 0 else -1, :: 1 if columns > 0 else -1])
