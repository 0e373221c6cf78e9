"""Arithmetic on weights that exist only in pieces: the heart of Evenkeel."""

from pretrain.sharded.full import gathered, small_weights
from pretrain.sharded.gathered_engine import GatheredWeights
from pretrain.sharded.moments import Moments
from pretrain.sharded.weights import ShardedWeights

__all__ = ["GatheredWeights", "Moments", "ShardedWeights", "gathered", "small_weights"]
