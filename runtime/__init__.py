"""The thin runtime: opens an artifact and generates, without tracing, transformers or torch_npu."""

from .conversation import Conversation
from .generate import Generation, Token
from .loader import load
from .model import Model

__all__ = ["Conversation", "Generation", "Model", "Token", "load"]
