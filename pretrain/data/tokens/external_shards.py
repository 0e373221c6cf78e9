"""A corpus of other trainers' token files: each file is divided into shards at ends of its documents.

The files stay as they are. So they, often hundreds of gigabytes each, are shuffled, packed and mapped piece by piece as
our own are. The document ends of a piece are computed from the index when they are asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import xxhash

from pretrain.data.json_files import content_hash
from pretrain.data.tokens.checksums import hash_file
from pretrain.data.tokens.corpus import Shard, TokenShards
from pretrain.data.tokens.corpus_files import LocalFiles
from pretrain.data.tokens.external_files import IndexedFile

SHARD_TOKENS = 100_000_000
_SAMPLE_BYTES = 1 << 16


class ExternalShards(TokenShards):
    """A corpus of other trainers' files; nothing is known of their tokenizer."""

    def __init__(self, location: str, format: str, files: list[IndexedFile]) -> None:
        """`files` lie in one folder, have one dtype and at least one token."""
        self._parts = [(file, *part) for file in files for part in _parts(file)]
        itemsize = files[0].dtype.itemsize
        super().__init__(
            location,
            LocalFiles(files[0].path.parent),
            [
                Shard(file.path.name, tokens, documents, tokens * itemsize, first_token=first_token)
                for file, _, _, first_token, tokens, documents in self._parts
            ],
            files[0].dtype,
            content_hash([format, files[0].dtype.name, [_identity(file) for file in files]]),
            format=format,
        )

    def _load_ends(self, shard: int) -> np.ndarray:
        file, first, stop, first_token, _, _ = self._parts[shard]
        ends = file.boundaries.ends(first, stop) - first_token
        return ends[np.diff(ends, prepend=0) > 0]


def _parts(file: IndexedFile) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (first document, stop document, first token, tokens, documents that are not empty) of each shard."""
    first, start = 0, 0
    count = file.boundaries.documents
    while first < count and start < file.tokens:
        stop = 1 + bisect_left(
            range(count - 1), start + SHARD_TOKENS, lo=first, key=lambda at: file.boundaries.ends(at, at + 1)[0]
        )
        ends = file.boundaries.ends(first, stop)
        documents = int(np.count_nonzero(np.diff(ends, prepend=start)))
        yield first, stop, start, int(ends[-1]) - start, documents
        first, start = stop, int(ends[-1])


def _identity(file: IndexedFile) -> list[int | str]:
    """Return the size of a file, its index and three samples of its tokens: enough to know it without reading it all."""
    size_bytes = file.path.stat().st_size
    samples = xxhash.xxh3_128()
    with open(file.path, "rb") as content:
        for offset in (0, size_bytes // 2, max(0, size_bytes - _SAMPLE_BYTES)):
            content.seek(offset)
            samples.update(content.read(_SAMPLE_BYTES))
    return [size_bytes, hash_file(file.index).digest(), samples.hexdigest()]
