"""Writes Evenkeel's own shards, so that a writer killed at any moment can continue from its last commit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from pretrain.data.tokens.checksums import BlockHasher, hash_file
from pretrain.data.tokens.corpus import ENDS_DTYPE
from pretrain.data.tokens.manifest import write_manifest
from pretrain.files import open_cut, sync_folder


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smaller of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class ShardWriter:
    """Appends documents to a shard folder and can continue, byte for byte, from any state that it committed."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, state: dict | None = None) -> None:
        """Begin in `folder`, or continue from `state`: what was written after it is removed, to be written again.

        Args:
            folder: The folder, made if it is not there.
            dtype: The dtype of the tokens.
            shard_tokens: A shard closes at the first document end at or past this many tokens.
            state: What `commit` returned.
        """
        self.folder = folder
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self._closed: list[dict] = list(state["closed"]) if state else []
        self._tokens: int = state["open_tokens"] if state else 0
        self._documents: int = state["open_documents"] if state else 0
        self._ended = True
        self._closed_tokens = sum(entry["tokens"] for entry in self._closed)
        self._closed_documents = sum(entry["documents"] for entry in self._closed)
        self._names_unsynced = True
        folder.mkdir(parents=True, exist_ok=True)
        self._open()

    @property
    def tokens(self) -> int:
        return self._closed_tokens + self._tokens

    @property
    def documents(self) -> int:
        """Documents that have ended."""
        return self._closed_documents + self._documents

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Add documents.

        Tokens after the last end begin a document that the next `append` continues. A shard closes at the first
        document end at or past `shard_tokens`: no document is in two shards, and one longer than a shard makes its
        shard longer.

        Args:
            tokens: (tokens,) of the shards' dtype.
            ends: (documents,) int64, increasing, the end of each document in `tokens`.
        """
        done, first = 0, 0
        while first < len(ends):
            room = self.shard_tokens - self._tokens
            last = min(int(np.searchsorted(ends, done + room)), len(ends) - 1)
            end = int(ends[last])
            self._ends.write((ends[first : last + 1] - done + self._tokens).astype(ENDS_DTYPE).tobytes())
            self._write(tokens[done:end])
            self._documents += last + 1 - first
            done, first = end, last + 1
            if self._tokens >= self.shard_tokens:
                self._close_shard()
                self._open()
        self._write(tokens[done:])
        self._ended = done == len(tokens) and (self._ended or done > 0)

    def commit(self) -> dict:
        """Flush everything to the disk and return the state, JSON, from which a later writer continues."""
        for file in (self._bin, self._ends):
            file.flush()
            os.fsync(file.fileno())
        if self._names_unsynced:
            sync_folder(self.folder)
            self._names_unsynced = False
        return {"closed": list(self._closed), "open_tokens": self._tokens, "open_documents": self._documents}

    def finish(self, description: dict) -> None:
        """Close the last shard and write the manifest, with the keys of `description` beside its own."""
        if not self._ended:
            raise ValueError("the last document has no end")
        if self._tokens:
            self._close_shard()
        else:
            self._discard_open_files()
        write_manifest(self.folder, self.dtype, self._closed, description)

    def _write(self, tokens: np.ndarray) -> None:
        content = np.ascontiguousarray(tokens, self.dtype).view(np.uint8).data
        self._bin.write(content)
        self._hasher.update(content)
        self._tokens += len(tokens)

    def _open(self) -> None:
        """Open the files of the current shard, cut back to what was committed."""
        size_bytes = self._tokens * self.dtype.itemsize
        self._bin = open_cut(self._path(".bin"), size_bytes)
        self._ends = open_cut(self._path(".ends"), self._documents * ENDS_DTYPE.itemsize)
        self._hasher = hash_file(self._path(".bin")) if size_bytes else BlockHasher()
        self._names_unsynced = True

    def _close_shard(self) -> None:
        self.commit()
        self._bin.close()
        self._ends.close()
        file, ends_file = self._path(".bin"), self._path(".ends")
        self._closed.append(
            {
                "file": file.name,
                "tokens": self._tokens,
                "documents": self._documents,
                "bytes": self._tokens * self.dtype.itemsize,
                "xxh3_128": self._hasher.digest(),
                "ends_file": ends_file.name,
                "ends_xxh3_128": hash_file(ends_file).digest(),
                "blocks_xxh3_64": self._hasher.blocks(),
            }
        )
        self._closed_tokens += self._tokens
        self._closed_documents += self._documents
        self._tokens = self._documents = 0

    def _discard_open_files(self) -> None:
        for file in (self._bin, self._ends):
            file.close()
            os.unlink(file.name)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard_{len(self._closed):05d}{suffix}"
