"""Finds every damaged file of a corpus, not only the first, and the damaged bytes, as far as checksums show."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from pretrain.data.json_files import read_json
from pretrain.data.progress import Progress
from pretrain.data.remote.cache import CacheSettings
from pretrain.data.remote.storage import is_remote
from pretrain.data.tokens.checksums import BLOCK_BYTES, hash_file
from pretrain.data.tokens.corpus import ENDS_DTYPE, Shard, TokenShards
from pretrain.data.tokens.corpus_files import LocalFiles
from pretrain.data.tokens.manifest import MANIFEST, describe_shards, read_manifest
from pretrain.data.tokens.shards import open_shards
from pretrain.data.tokens.verify import check_ids, ends_fault
from pretrain.errors import UserError

Damage = tuple[str, list[list[int]]]  # words for people, and [first, last] byte of each damaged stretch, if known


def open_unchecked(location: str, cache: CacheSettings | None) -> TokenShards:
    """Open the corpus at `location`, even if some of its files are damaged or missing.

    Args:
        location: The folder, prefix or URL.
        cache: The local cache of a remote corpus.

    Raises:
        UserError: The manifest is damaged, or in other trainers' formats an index.
    """
    folder = Path(location.removeprefix("file://"))
    path = folder / MANIFEST
    if is_remote(location) or not path.exists():
        return open_shards(location, verify="size", cache=cache)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Restore the file, or make its folder again.") from error
    return describe_shards(read_manifest(content, str(path)), str(path), location, lambda _: LocalFiles(folder))


def find_damage(shards: TokenShards, vocab_size: int | None) -> dict:
    """Read every file of a corpus, several at a time, and list those that differ from the manifest.

    Args:
        shards: The corpus.
        vocab_size: The number that all ids must be below; None for the one in the manifest.

    Returns:
        JSON. `damaged` has {"file", "fault", "bytes"} of each damaged file. "bytes" are [first, last] of every stretch
        that differs, to within a block of the checksums, and [] where that is not known.
    """
    vocab_size = vocab_size or shards.vocab_size
    blocks = _block_checksums(shards)
    sizes = [shard.bytes + (_ends_bytes(shard) if shard.ends_file else 0) for shard in shards.shards]
    progress = Progress("verified", sum(sizes))
    damaged: list[dict] = []
    done_bytes = documents = tokens = 0

    def look(number: int) -> list[dict]:
        return _damage(shards, number, blocks.get(shards.shards[number].file, []), vocab_size)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for shard, size, found in zip(shards.shards, sizes, pool.map(look, range(len(sizes))), strict=True):
            damaged += found
            done_bytes += size
            documents += shard.documents
            tokens += shard.tokens
            progress.update((done_bytes, documents, tokens))
    progress.close()
    return {
        "location": shards.location,
        "shards": len(shards.shards),
        "bytes": sum(sizes),
        "checksums": any(shard.xxh3_128 for shard in shards.shards),
        "ids_below": vocab_size,
        "damaged": damaged,
    }


def _block_checksums(shards: TokenShards) -> dict[str, list[str]]:
    """Return the checksums of blocks by file; none of remote files, which are fetched again as a whole if they differ."""
    if not isinstance(shards.files, LocalFiles) or not (path := shards.files.path(MANIFEST)).exists():
        return {}
    return {entry["file"]: entry.get("blocks_xxh3_64", []) for entry in read_json(path)["shards"]}


def _damage(shards: TokenShards, number: int, blocks: list[str], vocab_size: int | None) -> list[dict]:
    """Return the damage to the files of one shard."""
    shard = shards.shards[number]
    faults: dict[str, Damage | None] = {}
    if shard.xxh3_128:
        faults[shard.file] = _fault(shards, shard.file, lambda path: _fault_of_tokens(path, shard, blocks))
        faults[shard.ends_file] = _fault(shards, shard.ends_file, lambda path: _fault_of_ends(path, shard))
    if vocab_size is not None and not faults.get(shard.file):
        faults[shard.file] = _fault(shards, shard.file, lambda _: check_ids(shards, number, vocab_size))
    shards.close(number)
    return [{"file": file, "fault": fault[0], "bytes": fault[1]} for file, fault in faults.items() if fault]


def _fault(shards: TokenShards, file: str, look: Callable[[Path], Damage | None]) -> Damage | None:
    """Return the damage that `look` finds in a file, or the reason for which it cannot be read."""
    try:
        return look(shards.files.path(file))
    except FileNotFoundError:
        return "is missing", []
    except (OSError, UserError) as error:
        return str(error), []


def _fault_of_tokens(path: Path, shard: Shard, blocks: list[str]) -> Damage | None:
    if (size := path.stat().st_size) != shard.bytes:
        return _wrong_size(size, shard.bytes)
    found = hash_file(path)
    if found.digest() == shard.xxh3_128:
        return None
    differ = [number for number, pair in enumerate(zip(found.blocks(), blocks, strict=False)) if pair[0] != pair[1]]
    stretches = [
        [first * BLOCK_BYTES, min((last + 1) * BLOCK_BYTES, shard.bytes) - 1] for first, last in _stretches(differ)
    ]
    return "differs from its checksum", stretches


def _fault_of_ends(path: Path, shard: Shard) -> Damage | None:
    if (size := path.stat().st_size) != _ends_bytes(shard):
        return _wrong_size(size, _ends_bytes(shard))
    if hash_file(path).digest() == shard.ends_xxh3_128:
        return None
    fault = ends_fault([np.memmap(path, ENDS_DTYPE, mode="r")], shard.tokens)
    return f"differs from its checksum{f': {fault}' if fault else ''}", []


def _ends_bytes(shard: Shard) -> int:
    return shard.documents * ENDS_DTYPE.itemsize


def _wrong_size(found: int, expected: int) -> Damage:
    """Return the damage of a file that is too short or too long: from the byte where it ends, or should end."""
    return f"has {found:,} bytes, not {expected:,}", [[min(found, expected), max(found, expected) - 1]]


def _stretches(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each run of consecutive numbers."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[first], numbers[place - 1]
            first = place
