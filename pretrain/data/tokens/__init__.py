"""Token files: Evenkeel's own shards, and those of other trainers, read as one corpus."""

from pretrain.data.tokens.shards import TokenShards, open_shards

__all__ = ["TokenShards", "open_shards"]
