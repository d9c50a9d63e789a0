"""Advice of language models and other advisers, and its use by the agent (docs/llm.md)."""

import importlib
from typing import Any

# Name -> module, imported on first use: environments do not need pydantic.
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
