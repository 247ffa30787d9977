"""Memory that is used over and over: the system's pages for a new array cost more than what is done with it."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Room:
    """Space for a few arrays. What was taken under a name is overwritten by what is taken under it next."""

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}

    def floats(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A float32 array of any content."""
        return self._take(name, shape, np.dtype(np.float32))

    def bytes(self, name: str, shape: tuple[int, ...]) -> NDArray[np.int8]:
        """An int8 array of any content."""
        return self._take(name, shape, np.dtype(np.int8))

    def _take(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        size = prod(shape)
        if name not in self._arrays or self._arrays[name].size < size:
            self._arrays[name] = np.empty(size, dtype)
        return self._arrays[name][:size].reshape(shape)
