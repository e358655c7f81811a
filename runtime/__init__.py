"""The thin runtime: opens an artifact and generates, without tracing, transformers or torch_npu."""

from .loader import load
from .model import Model
from .requests.answer import Generation, Token
from .requests.conversation import Conversation

__all__ = ["Conversation", "Generation", "Model", "Token", "load"]
