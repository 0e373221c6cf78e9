"""The state of every random generator of a rank, as plain values and tensors."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import numpy as np
import torch


def random_states() -> dict[str, Any]:
    """Return the states of the global generators of Python, NumPy, torch and this rank's GPU."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    states = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the generators back to `states`, from `random_states`."""
    random.setstate(states["python"])
    numpy = states["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy()}})
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def seed_for_new_layout(seed: int, step: int, reader: int) -> None:
    """Seed the global generators of a rank whose states no checkpoint holds, because it was written by other ranks.

    Only dropout draws from them. Its draws are then as random as before, and the same whenever this layout resumes here.

    Args:
        seed: the seed of the run.
        step: optimizer steps done.
        reader: the number of this rank's group among those that read different batches. The ranks of a tensor-parallel
            group must draw the same.
    """
    digest = blake2b(f"{seed} {step} {reader}".encode(), digest_size=4).digest()
    number = int.from_bytes(digest, "little")
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
