"""transformers' default picture processor for Qwen2-VL, in the form that needs no torchvision."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .transformers_import import import_transformers


def default_image_processor(folder: Path | str | None = None, **settings: Any) -> Any:
    """Qwen2VLImageProcessorPil with Qwen2VLImageProcessor's resize; from a checkpoint's folder, or with `settings`.

    The two processors differ in that alone: the default one calls torchvision's resize, which for uint8 is
    torch.nn.functional.interpolate. Raises MissingDependencyError without transformers.
    """
    import_transformers()
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as original

    class DefaultProcessor(original.Qwen2VLImageProcessorPil):
        def resize(self, image: NDArray[np.uint8], size: Any, resample: Any, factor: int, **rest: Any) -> Any:
            bounds = {"min_pixels": size.shortest_edge, "max_pixels": size.longest_edge}
            wanted = original.smart_resize(*image.shape[-2:], factor=factor, **bounds)
            pixels = torch.from_numpy(np.ascontiguousarray(image))[None]
            resized = torch.nn.functional.interpolate(pixels, size=wanted, mode="bicubic", antialias=True)
            return resized[0].numpy()

    if folder is None:
        return DefaultProcessor(**settings)
    return DefaultProcessor.from_pretrained(str(folder), local_files_only=True, **settings)
