"""Whole documents packed into samples, so that none is cut that fits into one.

The plan of a shard, which documents share a sample, is computed once (`best_fit.py`) and stored. `<shard>_<samples>.npy`
holds (3, pieces) unsigned integers: the sample of each piece, ascending, its first token in the shard, and its length.
After them comes the XXH3-128 of all that. So a listing of the folder gives all counts, and a run that starts again reads
no boundaries.
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
from pretrain.data.batches.samples import IdCheck, SampleRows
from pretrain.data.json_files import content_hash
from pretrain.data.tokens.shards import TokenShards
from pretrain.errors import UserError
from pretrain.files import unfinished

VERSION = 1
OPEN_PLANS = 256  # each holds a file descriptor
DIGEST_BYTES = 16


class BestFit:
    """`Samples` of whole documents, one after another; the places that are left at the end are padding.

    The first token of a document, or of a piece of one that is longer than a sample, is never a target, and every other
    token is the target of one place.
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
        """Make the plans that are missing.

        Args:
            shards: The corpus.
            seq_len: The inputs of a sample.
            folder: The folder of plans; processes, nodes and runs may share it.
            document_attention: Give each piece positions, and attention, of its own.
            vocab_size: The ids of the model; to read a token that is not below it is a UserError. None: no check.
        """
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
        """The share of places whose target counts; the rest are padding and the ends of documents."""
        places = int(self.counts.sum()) * self.seq_len
        return (self.shards.tokens - self.shards.documents) / places if places else 0.0

    def read(self, shards: np.ndarray, numbers: np.ndarray, into: SampleRows) -> None:
        for row, (shard, number) in enumerate(zip(shards.tolist(), numbers.tolist(), strict=True)):
            self._read_one(shard, self._pieces(shard, number), into[row : row + 1])

    def documents(self, shard: int, number: int) -> list[tuple[int, int, int]]:
        ends, room = self.shards.open_ends(shard), self.seq_len
        documents = []
        for start, length in self._pieces(shard, number):
            document = int(np.searchsorted(ends, ends.dtype.type(start), side="right"))
            documents.append((document, start, start + min(length, room)))
            room -= length
        return documents

    def _read_one(self, shard: int, pieces: list[tuple[int, int]], row: SampleRows) -> None:
        tokens, place = self.shards.open_tokens(shard), 0
        assert row.counted is not None  # since these samples are `masked`
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

    def _count_up(self, row: SampleRows, start: int, stop: int) -> None:
        """Write the positions of the tokens of one document, or of padding."""
        if row.positions is not None:
            places = row.positions[0, start:stop]
            places[:] = self._ramp[: len(places)]

    def _pieces(self, shard: int, number: int) -> list[tuple[int, int]]:
        """Return the first token and the length of each piece of a sample."""
        samples, starts, lengths = self._plans.of(shard)
        first, last = np.searchsorted(samples, np.array([number, number + 1], dtype=samples.dtype))
        return list(zip(starts[first:last].tolist(), lengths[first:last].tolist(), strict=True))


class Plans:
    """The stored plans of one corpus and one length of samples, in a folder of their own."""

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
        """Make the plans that are not in the folder; other processes may do so at the same time.

        Each process takes them in a random order, so two seldom make the same one, and none waits for another.

        Raises:
            UserError: The document ends of a shard are corrupt, or the folder does not take the plans.
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
        """Return the samples of each shard, int64 (shards,); no plan may be missing."""
        self._names = self._listing()
        return np.array([self._names[shard][1] for shard in range(len(self._shards.shards))], dtype=np.int64)

    def _open(self, shard: int) -> np.ndarray:
        """Return the plan of `shard`, (3, pieces), mapped; a damaged one is made again."""
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
        """Return the name and the count of samples of every plan that is there, by shard."""
        names = filter(None, map(re.compile(r"(\d{6,})_(\d+)\.npy").fullmatch, os.listdir(self.folder)))
        return {int(name[1]): (name[0], int(name[2])) for name in names}


def _store(path: Path, plan: np.ndarray) -> None:
    """Write a plan and its checksum: complete or absent, even if another process writes the same."""
    content = BytesIO()
    np.save(content, plan)
    with unfinished(path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")) as temporary:
        with open(temporary, "wb") as file:
            file.write(content.getbuffer())
            file.write(xxhash.xxh3_128_digest(content.getbuffer()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _is_intact(path: Path) -> bool:
    try:
        content = memoryview(path.read_bytes())
    except OSError:
        return False
    return content[-DIGEST_BYTES:] == xxhash.xxh3_128_digest(content[:-DIGEST_BYTES])
