"""Whole documents packed into samples, so that none is cut that fits into one.

Which documents share a sample is computed once a shard (`best_fit.py`) and stored: `<shard>_<samples>.npy` holds
(3, pieces) unsigned integers: the sample of each piece, ascending, its first token in the shard, and its length; and after
them the XXH3-128 of all that. So a listing of the folder tells all counts, and a run that starts again reads no boundaries.
"""

from __future__ import annotations

import os
import re
import uuid
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from random import SystemRandom

import numpy as np
import xxhash

from pretrain.data.batches.best_fit import best_fit_decreasing, cut_into_pieces
from pretrain.data.batches.samples import IdCheck, Rows
from pretrain.data.json_files import content_hash
from pretrain.data.tokens.shards import TokenShards
from pretrain.errors import UserError
from pretrain.files import unfinished

VERSION = 1
OPEN_PLANS = 256  # each holds a file descriptor
DIGEST_BYTES = 16


class BestFit:
    """`Samples` of whole documents, one after another; the places left over at the end are padding.

    The first token of a document, or of a piece of one that is longer than a sample, is never a target, and every other
    token is the target of one place. With document_attention each piece has positions, and attention, of its own.

    folder: where plans are kept; processes, nodes and runs may share it. Missing and damaged plans are made.
    """

    masked = True

    def __init__(
        self,
        shards: TokenShards,
        seq_len: int,
        folder: Path,
        document_attention: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.carries_documents = document_attention
        self._plans = Plans(shards, seq_len, folder)
        self._plans.make_missing()
        self.counts = self._plans.counts()
        self._check = IdCheck(shards, vocab_size)
        self._ramp = np.arange(seq_len)
        self._padding = 0 if shards.eos_id is None else shards.eos_id

    @property
    def utilization(self) -> float:
        """The share of places whose target counts, padding and the ends of documents being the rest."""
        places = int(self.counts.sum()) * self.seq_len
        return (self.shards.tokens - self.shards.documents) / places if places else 0.0

    def read(self, shards: np.ndarray, numbers: np.ndarray, into: Rows) -> None:
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            self._read_one(shard, self._pieces(shard, number), into[row : row + 1])

    def documents(self, shard: int, number: int) -> list[tuple[int, int, int]]:
        ends, room, found = self.shards.open_ends(shard), self.seq_len, []
        for start, length in self._pieces(shard, number):
            document = int(np.searchsorted(ends, ends.dtype.type(start), side="right"))
            found.append((document, start, start + min(length, room)))
            room -= length
        return found

    def _read_one(self, shard: int, pieces: list[tuple[int, int]], row: Rows) -> None:
        tokens, place = self.shards.open_tokens(shard), 0
        row.counted[:] = False
        for start, length in pieces:
            stop = place + length
            piece = tokens[start : start + length]
            self._check(shard, np.array([start]), piece[None])
            row.tokens[0, place:stop] = piece
            row.counted[0, place : stop - 1] = True
            self._count_up(row, place, stop)
            place = stop
        row.tokens[0, place:] = self._padding
        self._count_up(row, place, self.seq_len)

    def _count_up(self, row: Rows, start: int, stop: int) -> None:
        """Positions of a document's, or of padding's, tokens."""
        if row.positions is not None:
            places = row.positions[0, start:stop]
            places[:] = self._ramp[: len(places)]

    def _pieces(self, shard: int, number: int) -> list[tuple[int, int]]:
        """First token and length of each piece of a sample."""
        samples, starts, lengths = self._plans.of(shard)
        first, last = np.searchsorted(samples, np.array([number, number + 1], dtype=samples.dtype))
        return list(zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True))


class Plans:
    """The stored plans of one corpus and one length of samples: a folder of its own in `folder`."""

    def __init__(self, shards: TokenShards, seq_len: int, folder: Path) -> None:
        # None, not the empty string, where there is no checksum: the names of stored plans depend on it.
        boundaries = [(shard.tokens, shard.documents, shard.ends_xxh3_128 or None) for shard in shards.shards]
        key = content_hash([VERSION, shards.fingerprint, boundaries, seq_len])
        self.folder = Path(folder) / f"best_fit_{seq_len}_{key}"
        self._shards = shards
        self._capacity = seq_len + 1
        self._intact: set[int] = set()
        self._names: dict[int, tuple[str, int]] = {}
        self.of = lru_cache(OPEN_PLANS)(self._open)

    def make_missing(self) -> None:
        """Make the plans that are not in the folder, together with whoever else does so at the time.

        Each process goes through them in an order of its own, so two seldom make the same one; nobody waits for another.
        UserError where the boundaries of a shard's documents make no sense, or the folder does not take the plans.
        """
        try:
            self._make_missing()
        except OSError as error:
            raise UserError(
                f"cannot keep plans of packed documents in {self.folder}: {error}. Make room, or name another folder: "
                "data.cache.folder."
            ) from error

    def _make_missing(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = list({*range(len(self._shards.shards))} - self._listing().keys())
        SystemRandom().shuffle(missing)
        for shard in missing:
            if shard not in self._listing():
                self._make(shard)
                self._shards.close(shard)

    def counts(self) -> np.ndarray:
        """The samples of each shard, int64 (shards,), once no plan is missing."""
        self._names = self._listing()
        return np.array([self._names[shard][1] for shard in range(len(self._shards.shards))], dtype=np.int64)

    def _open(self, shard: int) -> np.ndarray:
        """The plan of `shard`, (3, pieces), mapped; a damaged one is made anew."""
        path = self.folder / self._names[shard][0]
        if shard not in self._intact and not _is_intact(path):
            self._make(shard)
        self._intact.add(shard)
        return np.asarray(np.load(path, mmap_mode="r"))

    def _make(self, shard: int) -> None:
        entry, ends = self._shards.shards[shard], self._shards.open_ends(shard)
        starts, lengths = cut_into_pieces(ends, self._capacity)
        samples = best_fit_decreasing(lengths, self._capacity)
        by_sample = np.argsort(samples, kind="stable")
        dtype = np.uint32 if entry.tokens < 1 << 32 else np.uint64
        plan = np.stack([samples[by_sample], starts[by_sample], lengths[by_sample]]).astype(dtype)
        _store(self.folder / f"{shard:06d}_{int(samples.max(initial=-1)) + 1}.npy", plan)

    def _listing(self) -> dict[int, tuple[str, int]]:
        """Name and count of samples of every plan that is there."""
        names = filter(None, map(re.compile(r"(\d{6,})_(\d+)\.npy").fullmatch, os.listdir(self.folder)))
        return {int(name[1]): (name[0], int(name[2])) for name in names}


def _store(path: Path, plan: np.ndarray) -> None:
    """Complete or absent, whoever else writes the same."""
    content = BytesIO()
    np.save(content, plan)
    with unfinished(path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")) as aside:
        with open(aside, "wb") as file:
            file.write(content.getbuffer())
            file.write(xxhash.xxh3_128_digest(content.getbuffer()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


def _is_intact(path: Path) -> bool:
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return False
    return content[-DIGEST_BYTES:] == xxhash.xxh3_128_digest(content[:-DIGEST_BYTES])
