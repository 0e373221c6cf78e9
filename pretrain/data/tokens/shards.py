"""Token shards: raw little-endian numbers that any tool can map into memory, and one manifest that describes them.

A folder holds shard_00000.bin (uint16 or uint32 tokens, each document closed by the separator), shard_00000.ends
(uint64, where each document of the shard ends) and manifest.json. The manifest is written last, so a folder that has
one is complete. docs/data.md has the format in full.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pretrain.data.contents import content_hash, read_json
from pretrain.errors import UserError
from pretrain.files import checksum, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
ENDS_DTYPE = np.dtype("<u8")


@dataclass(frozen=True)
class Shard:
    """One shard as the manifest describes it; both files' checksums are xxh3_128 in hex."""

    file: str
    tokens: int
    documents: int
    bytes: int
    xxh3_128: str
    ends_file: str
    ends_xxh3_128: str


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class TokenShards:
    """The tokens of a shard folder as one long array, read through memory maps.

    `tokens` counts them and `text_bytes` the UTF-8 they stand for; `dtype` is theirs on disk; `vocab_size`, `eos_id`
    and `tokenizer_fingerprint` are those of the tokenizer that made them; `fingerprint` stands for the exact tokens.
    """

    def __init__(self, folder: Path, manifest: dict) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = [Shard(**entry) for entry in manifest["shards"]]
        self.tokens: int = manifest["tokens"]
        self.documents: int = manifest["documents"]
        self.text_bytes: int = manifest["text_bytes"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.fingerprint = content_hash([manifest["dtype"], [(shard.tokens, shard.xxh3_128) for shard in self.shards]])
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._maps: list[np.ndarray | None] = [None] * len(self.shards)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 of the concatenated shards, `dtype`, shape (stop - start,); do not write into it."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start}..{stop} are not within the {self.tokens} of {self.folder}")
        parts = []
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            shard_start, shard_stop = int(self._starts[shard]), int(self._starts[shard + 1])
            end = min(stop, shard_stop)
            parts.append(self._map(shard)[start - shard_start : end - shard_start])
            start, shard = end, shard + 1
        if not parts:
            return np.empty(0, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _map(self, shard: int) -> np.ndarray:
        """The tokens of one shard; mapped when first needed, since a rank may never visit most of them."""
        if self._maps[shard] is None:
            self._maps[shard] = np.asarray(np.memmap(self.folder / self.shards[shard].file, dtype=self.dtype, mode="r"))
        return self._maps[shard]


def open_shards(folder: str | Path, verify: str = "full", *, rank: int = 0, world_size: int = 1) -> TokenShards:
    """The shards in `folder`, after checking that its files are what the manifest says.

    `verify="size"` checks that every file is there with its size; `"full"` also its checksum. Ranks share the hashing:
    rank r of R reads shards r, r + R, ..., so a bad checksum is a UserError on one rank only; tell the others. What
    any rank can see by looking (manifest, names, sizes) is checked by all.
    """
    if verify not in ("full", "size"):
        raise ValueError(f"verify is 'full' or 'size', not {verify!r}")
    folder = Path(folder)
    shards = _from_manifest(folder)
    for shard in shards.shards:
        _check_size(folder / shard.file, shard.bytes)
        _check_size(folder / shard.ends_file, shard.documents * ENDS_DTYPE.itemsize)
    if verify == "full":
        for shard in shards.shards[rank::world_size]:
            _check_sum(folder / shard.file, shard.xxh3_128)
            _check_sum(folder / shard.ends_file, shard.ends_xxh3_128)
    return shards


class ShardWriter:
    """Appends documents to a shard folder and can go on, byte for byte, from any state it once committed."""

    def __init__(self, folder: Path, dtype: np.dtype, shard_tokens: int, state: dict | None = None) -> None:
        """Begin in `folder`, or go on from `state`: what was written after it is thrown away and comes again."""
        self.folder = folder
        self.dtype = dtype
        self.shard_tokens = shard_tokens
        self._closed = [Shard(**entry) for entry in state["closed"]] if state else []
        self._tokens: int = state["open_tokens"] if state else 0
        self._documents: int = state["open_documents"] if state else 0
        folder.mkdir(parents=True, exist_ok=True)
        self._open()

    @property
    def tokens(self) -> int:
        return self._tokens + sum(shard.tokens for shard in self._closed)

    @property
    def documents(self) -> int:
        return self._documents + sum(shard.documents for shard in self._closed)

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Add whole documents: `tokens` of the shards' dtype, `ends` (int64) where each document ends in them.

        A shard closes at the first document end at or past `shard_tokens`, so no document is in two shards.
        """
        done, first = 0, 0
        while first < len(ends):
            room = self.shard_tokens - self._tokens
            last = min(int(np.searchsorted(ends, done + room)), len(ends) - 1)
            end = int(ends[last])
            self._bin.write(tokens[done:end].tobytes())
            self._ends.write((ends[first : last + 1] - done + self._tokens).astype(ENDS_DTYPE).tobytes())
            self._tokens += end - done
            self._documents += last + 1 - first
            done, first = end, last + 1
            if self._tokens >= self.shard_tokens:
                self._close_shard()
                self._open()

    def commit(self) -> dict:
        """Flush everything to the disk; the JSON state from which a later writer goes on."""
        for file in (self._bin, self._ends):
            file.flush()
            os.fsync(file.fileno())
        return {
            "closed": [asdict(shard) for shard in self._closed],
            "open_tokens": self._tokens,
            "open_documents": self._documents,
        }

    def finish(self, description: dict) -> None:
        """Close the last shard and write the manifest: `description` plus what is known here."""
        if self._tokens:
            self._close_shard()
        else:
            self._discard_open_files()
        write_json(
            self.folder / MANIFEST,
            {
                "schema_version": SCHEMA_VERSION,
                "dtype": self.dtype.name,
                "tokens": self.tokens,
                "documents": self.documents,
                **description,
                "shards": [asdict(shard) for shard in self._closed],
            },
        )

    def _open(self) -> None:
        """Open the files of the current shard, cut back to what was committed."""
        self._bin = _open_cut(self._path(".bin"), self._tokens * self.dtype.itemsize)
        self._ends = _open_cut(self._path(".ends"), self._documents * ENDS_DTYPE.itemsize)

    def _close_shard(self) -> None:
        self.commit()
        self._bin.close()
        self._ends.close()
        file, ends_file = self._path(".bin"), self._path(".ends")
        self._closed.append(
            Shard(
                file=file.name,
                tokens=self._tokens,
                documents=self._documents,
                bytes=self._tokens * self.dtype.itemsize,
                xxh3_128=checksum(file),
                ends_file=ends_file.name,
                ends_xxh3_128=checksum(ends_file),
            )
        )
        self._tokens = self._documents = 0

    def _discard_open_files(self) -> None:
        for file in (self._bin, self._ends):
            file.close()
            os.unlink(file.name)

    def _path(self, suffix: str) -> Path:
        return self.folder / f"shard_{len(self._closed):05d}{suffix}"


def _from_manifest(folder: Path) -> TokenShards:
    path = folder / MANIFEST
    if not path.exists():
        if (folder / "train" / MANIFEST).exists():
            raise UserError(f"'{folder}' holds train and val; name one of them: '{folder / 'train'}'.")
        raise UserError(
            f"'{folder}' is not a folder of finished token shards: it has no {MANIFEST}. Make one with "
            "tools/prepare_data.py; if its preparation was interrupted, run the same command again to complete it."
        )
    manifest = read_json(path)
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version!r} and this version of the trainer reads {SCHEMA_VERSION}. "
            "Prepare the data again with tools/prepare_data.py."
        )
    try:
        shards = TokenShards(folder, manifest)
        sums_agree = shards.tokens == sum(shard.tokens for shard in shards.shards)
        sizes_agree = all(shard.bytes == shard.tokens * shards.dtype.itemsize for shard in shards.shards)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a manifest of token shards: {type(error).__name__} {error}. "
            "Restore it, or prepare the data again with tools/prepare_data.py."
        ) from error
    if not (sums_agree and sizes_agree):
        raise UserError(
            f"{path} contradicts itself: its shards do not add up to its {shards.tokens} tokens. Restore it."
        )
    return shards


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise UserError(
            f"{path} is missing, though the manifest beside it lists it. Restore it or prepare the data again."
        )
    if (found := path.stat().st_size) != expected_bytes:
        raise UserError(
            f"{path} has {found} bytes and the manifest beside it says {expected_bytes}. "
            "The file was cut or changed: restore it or prepare the data again."
        )


def _check_sum(path: Path, expected: str) -> None:
    if (found := checksum(path)) != expected:
        raise UserError(
            f"{path} has the checksum {found} and the manifest beside it says {expected}. "
            "The file is corrupt: restore it or prepare the data again."
        )


def _open_cut(path: Path, size_bytes: int):
    """`path` open for appending after exactly its first `size_bytes` bytes; UserError if it has fewer."""
    file = open(path, "ab")  # noqa: SIM115 - the writer keeps it open
    if file.tell() < size_bytes:
        raise UserError(
            f"{path} is shorter than the interrupted preparation had left it. Delete its folder and start again."
        )
    file.truncate(size_bytes)
    return file
