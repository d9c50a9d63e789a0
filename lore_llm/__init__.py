"""Advice of a language model: who is asked, what is answered, and how it reaches the agent (docs/llm.md)."""

import importlib
from typing import Any

# Name -> module. They are imported when asked for: environments and their tests need no pydantic.
_HOMES = {
    "ActionPrior": "advice",
    "Advice": "advice",
    "AdviserFault": "advice",
    "Answer": "advice",
    "LLMAdapter": "backends",
    "OptionSpec": "advice",
    "Request": "advice",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
