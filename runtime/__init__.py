"""The thin runtime: opens an artifact and generates, without tracing, transformers or torch_npu."""

from .loader import load
from .model import Model
from .requests.conversation import Conversation
from .requests.generate import Generation, Token

__all__ = ["Conversation", "Generation", "Model", "Token", "load"]
