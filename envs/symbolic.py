"""The observation `symbolic`, from which captions are made (lore_llm/captions.py).

It is a flat int16 vector of a fixed layout, so that it fits into shared memory like any observation. The
agent never learns from it, and it exists only with `llm.enabled`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

KEY = "symbolic"


class Layout:
    """Named parts of a flat int16 vector, in order: `Layout(view=(9, 7), facing=(2,), asleep=())`."""

    def __init__(self, **shapes: tuple[int, ...]):
        self._parts = {}
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            self._parts[name] = slice(start, start + size), shape
            start += size
        self.size = start
        info = np.iinfo(np.int16)
        self.space = spaces.Box(info.min, info.max, (start,), np.int16)

    def pack(self, **values: Any) -> np.ndarray:
        """The vector [size] of these parts. Each part must have its declared size."""
        vector = np.empty(self.size, np.int16)
        for name, (place, shape) in self._parts.items():
            vector[place] = np.reshape(values.pop(name), -1) if shape else values.pop(name)
        return vector

    def unpack(self, vector: np.ndarray) -> Mapping[str, np.ndarray]:
        """The parts of a vector [size] with their shapes, as views."""
        return {name: vector[place].reshape(shape) for name, (place, shape) in self._parts.items()}
