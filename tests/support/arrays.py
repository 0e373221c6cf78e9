"""Arrays by name in one file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def save_arrays(path: Path | str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file of arrays; `numpy.load` reads them by their names."""
    any_names: dict[str, Any] = dict(arrays)  # numpy's own keyword would take a bool
    np.savez(path, **any_names)
