"""Resizing in torch, for machines that cykooz.resizer has no wheel for: the same bits."""

import numpy as np
import torch


def torch_pass(data: bytes, width: int, height: int, new_width: int, new_height: int) -> bytes:
    """Resize pixels uint8 [height, width, 3]; see runtime.resize.Pass."""
    pixels = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(1, height, width, 3).copy()).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, size=(new_height, new_width), mode="bicubic", antialias=True)
    return resized.permute(0, 2, 3, 1).numpy().tobytes()
