"""A dtype's objects in torch and in numpy, by the artifact's name; neither is imported before one is asked for."""

from typing import TYPE_CHECKING, Any

from ..artifacts.dtypes import numpy_name, torch_name

if TYPE_CHECKING:
    import numpy as np
    import torch


def torch_dtype(name: str) -> "torch.dtype":
    """torch.bfloat16 of bf16."""
    import torch

    dtype: torch.dtype = getattr(torch, torch_name(name))
    return dtype


def numpy_dtype(name: str) -> "np.dtype[Any]":
    """numpy's dtype; ml_dtypes' of bf16, which numpy itself does not have."""
    import ml_dtypes
    import numpy as np

    own_name = numpy_name(name)
    return np.dtype(getattr(ml_dtypes, own_name) if own_name == "bfloat16" else own_name)
