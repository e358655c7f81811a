"""The thin runtime: opens an artifact and generates, without tracing, transformers or torch_npu."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loader import load
    from .model import Model
    from .requests.answer import Generation, Token
    from .requests.conversation import Conversation

__all__ = ["Conversation", "Generation", "Model", "Token", "load"]

_PLACES = {"Conversation": "requests.conversation", "Generation": "requests.answer", "Model": "model"}
_PLACES |= {"Token": "requests.answer", "load": "loader"}


def __getattr__(name: str) -> Any:
    """What this package offers, when it is asked for: who needs one module of it does without Pillow and tokenizers."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
