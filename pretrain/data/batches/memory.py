"""Reused memory for batches: fresh pages from the system cost more than the reading itself."""

from __future__ import annotations

import weakref

import numpy as np
import torch


class Memory:
    """Tensors of one shape and dtype, each of which is reused when nothing refers to it or to a part of it.

    Pinned ones come from torch's own pool, which keeps track of the copies to a device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> None:
        self._shape = shape
        self._dtype = dtype
        self._pinned = pinned
        self._arrays: list[tuple[np.ndarray, weakref.ref]] = []  # and the view of it that the last tensor keeps alive

    def take(self, rows: int) -> torch.Tensor:
        """Return a tensor of the first `rows` rows, with any content."""
        if self._pinned:
            return torch.empty((rows, *self._shape[1:]), dtype=self._dtype, pin_memory=True)
        number = next((i for i, (_, user) in enumerate(self._arrays) if user() is None), len(self._arrays))
        array = (
            self._arrays[number][0]
            if number < len(self._arrays)
            else torch.empty(self._shape, dtype=self._dtype).numpy()
        )
        view = array[:rows]
        self._arrays[number : number + 1] = [(array, weakref.ref(view))]
        return torch.from_numpy(view)
