"""Evenkeel's loader, measured like the others in rivals/loaders.py, and the data sets for it. Started by data.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rivals.loaders import SEED, report
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.loader import Loader
from pretrain.data.batches.order import GlobalOrder
from pretrain.data.batches.samples import Concatenated
from pretrain.data.batches.stream import Stream
from pretrain.data.tokens import ShardWriter, open_shards
from pretrain.data.tokens.manifest import write_manifest

DOCUMENT_TOKENS = 1000
SHARD_TOKENS = 1 << 25
GROWN_SHARD_TOKENS = 1 << 30
DESCRIPTION = {"text_bytes": 0, "vocab_size": 1 << 15, "eos_id": 0, "tokenizer_fingerprint": "0" * 32}


def main() -> None:
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    report(asked.pop("do"), read, asked)


def write(tokens: np.ndarray, folder: Path) -> None:
    writer = ShardWriter(folder, tokens.dtype, SHARD_TOKENS)
    ends = np.arange(DOCUMENT_TOKENS, len(tokens) + DOCUMENT_TOKENS, DOCUMENT_TOKENS)
    writer.append(tokens, np.minimum(ends, len(tokens)))
    writer.finish(DESCRIPTION)


def grow(folder: Path, samples: int, seq_len: int) -> None:
    """Make shards that are holes in files, of one document each."""
    entries: list[dict[str, Any]] = []
    left = samples * seq_len
    while left > 0:
        tokens = min(left, GROWN_SHARD_TOKENS)
        file, ends_file = (f"hole_{len(entries):05}.{suffix}" for suffix in ("bin", "ends"))
        with open(folder / file, "wb") as hole:
            hole.truncate(2 * tokens)
        (folder / ends_file).write_bytes(np.uint64(tokens).tobytes())
        sizes = {"tokens": tokens, "bytes": 2 * tokens, "documents": 1}
        checksums = {"xxh3_128": "0" * 32, "ends_xxh3_128": "0" * 32, "blocks_xxh3_64": []}
        entries.append({"file": file, "ends_file": ends_file, **sizes, **checksums})
        left -= tokens
    write_manifest(folder, np.dtype(np.uint16), entries, DESCRIPTION)


def read(folder: Path, *, seq_len: int, batch_size: int, position: int = 0, **_: object) -> Iterator[torch.Tensor]:
    """Read like a run on one rank, without the check of checksums; yield the inputs of one micro-batch a step."""
    samples = Concatenated(open_shards(folder, verify="size"), seq_len)
    feed = Feed([Stream(samples, GlobalOrder(samples.counts, SEED))])
    loader = Loader(
        feed, global_batch_size=batch_size, micro_batch_size=batch_size, rank=0, world_size=1, position=position
    )
    try:
        while True:
            yield loader.next_batch()[0].inputs
    finally:
        loader.close()


if __name__ == "__main__":
    main()
