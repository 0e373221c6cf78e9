"""Turns text into token shards, in several processes and on several nodes; a kill at any moment costs nothing."""

from pretrain.data.prepare.merge import merge
from pretrain.data.prepare.preparation import prepare

__all__ = ["merge", "prepare"]
