"""One read-only corpus of token files, whatever wrote them: shards of tokens, and where their documents end."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.data.tokens.corpus_files import CorpusFiles
from pretrain.errors import UserError

ENDS_DTYPE = np.dtype("<i8")  # uint64 on disk; no end is anywhere near 2^63, and signed numbers mix with others
# A map keeps its file open, and often only 1,024 files may be: Go and Java raise this limit too. A process may read
# several corpora, so each keeps to a part of it.
OPEN_FILES = 16_384
ENDS_HELD = 256  # those of external files are in memory, a megabyte or two each


@dataclass(frozen=True, slots=True)
class Shard:
    """Tokens that lie together in one file.

    Our own shards are whole files. Of another trainer's file a shard is the part from token `first_token` on, and there
    is neither a file of document ends nor a checksum: those fields are empty.

    Attributes:
        file: The name of the file of tokens.
        tokens: The number of tokens.
        documents: The number of documents that end in the shard.
        bytes: The size of its tokens.
        xxh3_128: The checksum of `file`, 32 hex digits.
        ends_file: The name of the file of document ends.
        ends_xxh3_128: The checksum of `ends_file`.
        first_token: The place of the first token in `file`.
    """

    file: str
    tokens: int
    documents: int
    bytes: int
    xxh3_128: str = ""
    ends_file: str = ""
    ends_xxh3_128: str = ""
    first_token: int = 0


class TokenShards:
    """The token files of one corpus, read through memory maps.

    Attributes:
        location: The folder, prefix or URL as the user named it.
        files: Access to the files.
        shards: The shards, in order.
        dtype: The dtype of the tokens on disk.
        fingerprint: A hash that stands for the exact tokens and their order.
        format: "evenkeel", or the name of another trainer's format.
        text_bytes: The bytes of UTF-8 text that the tokens stand for, if known.
        vocab_size: The number of ids of the tokenizer that made the tokens; None where the format does not say, as for
            the next two.
        eos_id: That tokenizer's separator of documents.
        tokenizer_fingerprint: Its fingerprint.
        manifest: What the format records about the corpus beyond its shards.
        tokens: The number of tokens in all shards.
        documents: The number of documents in all shards.
    """

    def __init__(
        self,
        location: str,
        files: CorpusFiles,
        shards: list[Shard],
        dtype: np.dtype,
        fingerprint: str,
        *,
        format: str = "evenkeel",
        text_bytes: int | None = None,
        vocab_size: int | None = None,
        eos_id: int | None = None,
        tokenizer_fingerprint: str | None = None,
        manifest: dict | None = None,
    ) -> None:
        self.location = location
        self.files = files
        self.shards = shards
        self.dtype = dtype
        self.fingerprint = fingerprint
        self.format = format
        self.text_bytes = text_bytes
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.manifest = manifest or {}
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        maps_held = _allowed_files() // 16
        self._token_maps = _Recent(maps_held, self._map_tokens)
        self._ends = _Recent(min(maps_held, ENDS_HELD), self._load_ends)

    def open_tokens(self, shard: int) -> np.ndarray:
        """Return the tokens of one shard, (tokens,) `dtype`, a read-only memory map; wait for a remote shard to be here.

        Raises:
            UserError: The file is not as long as it should be.
        """
        return self._token_maps.get(shard)

    def open_ends(self, shard: int) -> np.ndarray:
        """Return the end of each document of one shard, (documents,) int64, strictly increasing up to its tokens."""
        return self._ends.get(shard)

    def close(self, shard: int) -> None:
        """Forget the maps of one shard; a remote one may then leave the cache. It can be opened again."""
        entry = self.shards[shard]
        self._token_maps.drop(shard)
        self._ends.drop(shard)
        self.files.release(entry.file)
        if entry.ends_file:
            self.files.release(entry.ends_file)

    def fetch_ahead(self, shards: Sequence[int]) -> None:
        """Say which shards are needed soon, in this order; returns at once."""
        names = [name for shard in shards for name in (self.shards[shard].file, self.shards[shard].ends_file) if name]
        self.files.fetch_ahead(names)

    def head(self, count: int) -> np.ndarray:
        """Return the first `count` tokens (fewer if there are no more), `dtype`, without fetching whole remote shards."""
        parts = [np.empty(0, self.dtype)]
        for shard in self.shards:
            if count <= 0:
                break
            wanted = min(count, shard.tokens)
            start = shard.first_token * self.dtype.itemsize
            raw = self.files.read(shard.file, start, start + wanted * self.dtype.itemsize)
            parts.append(np.frombuffer(raw, self.dtype))
            count -= wanted
        return np.concatenate(parts)

    def bos_before_documents(self, bos_id: int | None, eos_id: int | None) -> int | None:
        """Return the token that every document begins with, None for none.

        Formats of other trainers and older manifests do not say. Then the first document decides: `bos_id` occurs in no
        text.

        Args:
            bos_id: The beginning-of-sequence token of the run's tokenizer.
            eos_id: Its separator of documents.
        """
        if "bos_id" in self.manifest:
            return self.manifest["bos_id"]
        return bos_id if bos_id not in (None, eos_id) and bos_id in self.head(1) else None

    def _map_tokens(self, shard: int) -> np.ndarray:
        entry = self.shards[shard]
        path = self.files.path(entry.file)
        offset = entry.first_token * self.dtype.itemsize
        if path.stat().st_size < offset + entry.bytes:
            raise UserError(
                f"{path} ends at byte {path.stat().st_size} and its tokens go on to byte {offset + entry.bytes}. "
                "The file was cut while it was in use: restore it."
            )
        # A plain array: indexing a memmap object costs several times as much.
        return np.asarray(np.memmap(path, self.dtype, mode="r", offset=offset, shape=(entry.tokens,)))

    def _load_ends(self, shard: int) -> np.ndarray:
        entry = self.shards[shard]
        path = self.files.path(entry.ends_file)
        if path.stat().st_size != entry.documents * ENDS_DTYPE.itemsize:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes and {entry.documents} document ends take "
                f"{entry.documents * ENDS_DTYPE.itemsize}. The file was cut or changed: restore it."
            )
        ends = np.asarray(np.memmap(path, ENDS_DTYPE, mode="r"))
        if len(descents := np.flatnonzero(ends[1:] <= ends[:-1])):
            raise UserError(
                f"{path} says that document {descents[0] + 1} ends at token {ends[descents[0] + 1]}, not after the one "
                "before it. The file is corrupt: restore it."
            )
        if ends[-1] != entry.tokens:
            raise UserError(
                f"{path} says that the last document ends at token {ends[-1]}, and its shard has {entry.tokens} tokens. "
                "The file is corrupt: restore it."
            )
        return ends


def _allowed_files() -> int:
    """Return how many files this process may have open, after raising that towards OPEN_FILES as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return OPEN_FILES
    if soft < OPEN_FILES:
        soft = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


class _Recent:
    """The arrays used last, at most `limit` of them; threads may share it."""

    def __init__(self, limit: int, load: Callable[[int], np.ndarray]) -> None:
        self._limit = limit
        self._load = load
        self._arrays: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: int) -> np.ndarray:
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = self._load(key)  # outside the lock: it may wait for a download
        with self._lock:
            self._arrays[key] = array
            if len(self._arrays) > self._limit:
                self._arrays.popitem(last=False)
        return array

    def drop(self, key: int) -> None:
        with self._lock:
            self._arrays.pop(key, None)
