"""Checkpoints that are complete or do not exist.

Layout of `<run>/checkpoints/step_00000500/`: DeepSpeed's own shards, `shards.json` about them, one `rng_rank_N.pt` per
rank, whatever the trainer adds (see trainer/trainer.py), `trainer.json`, and `manifest.json` with the size and checksum of every
file, written last. The folder is written under a temporary name and renamed when it is whole; `checkpoints/latest` names
the newest afterwards. The file system is shared by all ranks.

A checkpoint may come from anywhere: reading one runs nothing that it holds and opens nothing outside it.
"""

from pretrain.checkpoints.manager import Checkpoints, Saved
from pretrain.checkpoints.state import TrainerState

__all__ = ["Checkpoints", "Saved", "TrainerState"]
