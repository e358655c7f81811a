"""The thin runtime: opens an artifact and generates, without tracing, transformers or torch_npu."""

from .generate import Generation
from .loader import load
from .model import Model

__all__ = ["Generation", "Model", "load"]
