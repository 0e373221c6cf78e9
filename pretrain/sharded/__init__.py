"""Arithmetic on weights that exist only in pieces: the heart of Evenkeel."""

from pretrain.sharded.gathered import GatheredWeights
from pretrain.sharded.moments import Moments
from pretrain.sharded.weights import ShardedWeights

__all__ = ["GatheredWeights", "Moments", "ShardedWeights"]
