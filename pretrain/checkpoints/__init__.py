"""Checkpoints that are complete or do not exist.

Layout of `<run>/checkpoints/step_00000500/`:

    deepspeed/        DeepSpeed's own shards
    shards.json       metadata of the shards
    rng_rank_N.pt     the random states of each rank
    trainer.json      the state of the trainer
    manifest.json     the size and checksum of every file, written last

and the files that the trainer adds (see trainer/trainer.py). The folder is written under a temporary name and renamed when
it is whole. `checkpoints/latest` names the newest afterwards. The file system is shared by all ranks.

A checkpoint may come from anywhere: reading one runs nothing that it holds and opens nothing outside it.
"""

from pretrain.checkpoints.manager import Checkpoints, Saved
from pretrain.checkpoints.state import TrainerState

__all__ = ["Checkpoints", "Saved", "TrainerState"]
