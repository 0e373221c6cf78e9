"""Token files: Evenkeel's own shards, and those of other trainers, read as one corpus."""

from pretrain.data.tokens.corpus import Shard, TokenShards
from pretrain.data.tokens.shards import open_shards
from pretrain.data.tokens.writer import ShardWriter, token_dtype

__all__ = ["Shard", "ShardWriter", "TokenShards", "open_shards", "token_dtype"]
