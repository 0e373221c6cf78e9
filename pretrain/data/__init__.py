"""The path from text to token shards to batches.

Text (`text`) becomes shards once (`prepare`, `tokens`). Every run then reads them, here or from object storage (`remote`),
in an order that is computed (`batches`). `audit` shows their content. Nothing imported here needs torch, so that the
processes that tokenise start fast; import `Loader` from `pretrain.data.batches.loader`.
"""

from pretrain.data.batches.order import SampleOrder
from pretrain.data.tokenizer import check_tokenizer, fingerprint, load_tokenizer, separator_id
from pretrain.data.tokens.shards import TokenShards, open_shards

__all__ = [
    "SampleOrder",
    "TokenShards",
    "check_tokenizer",
    "fingerprint",
    "load_tokenizer",
    "open_shards",
    "separator_id",
]
