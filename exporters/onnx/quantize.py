"""Weights to integers with scales. All symmetric: value = (q - 2 ** (bits - 1)) * scale."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .source import Floats

Bytes = NDArray[np.uint8]
# MatMulNBits takes powers of two from here on
_LEAST_BLOCK = 16
# int4 has 16 steps: cutting off the largest values a little often serves the others better (least squares decides)
_INT4_CLIPS = (1.0, 0.92, 0.84)


def block_size(width: int, limit: int) -> int:
    """Values that share a scale: the largest power of two up to `limit` that divides `width`, at least 16."""
    block = limit
    while block > _LEAST_BLOCK and width % block:
        block //= 2
    return block


def quantize_blocks(rows: Floats, bits: int, block: int) -> tuple[Bytes, Floats]:
    """rows [n, width] to integers [n, blocks * block] (the last block padded with zero) and scales [n, blocks].

    8 bits: the largest magnitude becomes 127. 4 bits: the largest magnitude becomes -8 with a scale of its sign, as
    llama.cpp's Q4_0, or a little more than -8, if that is the smaller error over the block.
    """
    count, width = rows.shape
    blocks = -(-width // block)
    if width % block:
        rows = np.pad(rows, ((0, 0), (0, blocks * block - width)))
    x = rows.reshape(count, blocks, block)
    if bits == 8:
        scale = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        return _rounded(x, scale, 128, 255).reshape(count, -1), scale[..., 0]
    high, low = x.max(-1, keepdims=True), x.min(-1, keepdims=True)
    extreme = np.where(high > -low, high, low) / np.float32(-8)
    best, scale, error = None, extreme, None
    for clip in _INT4_CLIPS:
        tried = extreme * np.float32(clip)
        q = _rounded(x, tried, 8, 15)
        difference = (q.astype(np.float32) - 8) * tried - x
        found = np.einsum("nbk,nbk->nb", difference, difference)[..., None]
        if best is None or error is None:
            best, scale, error = q, tried, found
        else:
            better = found < error
            best, scale = np.where(better, q, best), np.where(better, tried, scale)
            error = np.minimum(found, error)
    assert best is not None
    return best.reshape(count, -1), scale[..., 0]


def _rounded(x: Floats, scale: Floats, middle: int, most: int) -> Bytes:
    """x / scale + middle, to the nearest integer from 0 to `most`; a scale of 0, or of nearly 0, gives the middle."""
    y = x * _inverse(scale)
    y += np.float32(middle)
    np.rint(y, out=y)
    np.clip(y, 0, most, out=y)
    return y.astype(np.uint8)


def _inverse(scale: Floats) -> Floats:
    """1 / scale; 0 where the scale is no normal number: its inverse may overflow, and processors take it for 0."""
    normal = np.abs(scale) >= np.finfo(np.float32).tiny
    return np.divide(1, scale, out=np.zeros_like(scale), where=normal)


def pack_int4(q: NDArray[Any]) -> NDArray[Any]:
    """Pairs along the last axis into bytes, the first of each in the low half."""
    return q[..., 0::2] | (q[..., 1::2] << 4)


def quantize_rows(rows: Floats) -> tuple[NDArray[np.int8], Floats]:
    """rows [n, width] to int8 with one scale a row, [n]: the largest magnitude becomes 127."""
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(127)
    return np.rint(rows * _inverse(scale)).astype(np.int8), scale[..., 0]
