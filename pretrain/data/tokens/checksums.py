"""Checksums of token files: one of the whole, and one per block, which shows the block where damage is."""

from __future__ import annotations

from pathlib import Path

import xxhash

BLOCK_BYTES = 32 << 20
_READ_BYTES = 4 << 20


class BlockHasher:
    """Computes XXH3-128 of bytes that come in pieces, and XXH3-64 of every 32 MiB of them."""

    def __init__(self) -> None:
        self._whole = xxhash.xxh3_128()
        self._block = xxhash.xxh3_64()
        self._block_bytes = 0
        self._done: list[str] = []

    def update(self, content: memoryview | bytes) -> None:
        self._whole.update(content)
        content = memoryview(content)
        while len(content):
            part = content[: BLOCK_BYTES - self._block_bytes]
            self._block.update(part)
            self._block_bytes += len(part)
            content = content[len(part) :]
            if self._block_bytes == BLOCK_BYTES:
                self._done.append(self._block.hexdigest())
                self._block.reset()
                self._block_bytes = 0

    def digest(self) -> str:
        """Return the XXH3-128 of everything, 32 hex digits."""
        return self._whole.hexdigest()

    def blocks(self) -> list[str]:
        """Return the XXH3-64 of every block, 16 hex digits each; the last block may be shorter."""
        return [*self._done, self._block.hexdigest()] if self._block_bytes else list(self._done)


def hash_file(path: Path) -> BlockHasher:
    """Return a hasher that has read the whole file."""
    hasher = BlockHasher()
    with open(path, "rb") as file:
        while content := file.read(_READ_BYTES):
            hasher.update(content)
    return hasher
