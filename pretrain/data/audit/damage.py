"""Every damaged file of a corpus, not only the first, and where it is damaged, as far as checksums tell."""

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
from pretrain.data.tokens.files import LocalFiles
from pretrain.data.tokens.manifest import MANIFEST, describe_shards, read_manifest
from pretrain.data.tokens.shards import open_shards
from pretrain.data.tokens.verify import check_ids, ends_fault
from pretrain.errors import UserError

Fault = tuple[str, list[list[int]]]  # what is wrong, and [first, last] byte of each stretch that is, if that is known


def open_unchecked(location: str, cache: CacheSettings | None) -> TokenShards:
    """The corpus at `location` with all its files, even if some are damaged or missing.

    UserError where that cannot be: the manifest is damaged, or in other trainers' formats an index.
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
    """Read every file of a corpus, several at a time, and list those that are not what the manifest says.

    Ids must be below `vocab_size`, or where it is None below what the manifest says. `damaged` has {"file", "fault",
    "bytes"} of each file at fault: [first, last] of every stretch that differs, to within a block of the checksums, and
    [] where that is not known.
    """
    vocab_size = vocab_size or shards.vocab_size
    blocks = _block_checksums(shards)
    sizes = [shard.bytes + _ends_bytes(shard) * bool(shard.ends_file) for shard in shards.shards]
    progress, damaged = Progress("verified", sum(sizes)), []
    done = (0, 0, 0)

    def look(number: int) -> list[dict]:
        return _damage(shards, number, blocks.get(shards.shards[number].file, []), vocab_size)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for shard, size, found in zip(shards.shards, sizes, pool.map(look, range(len(sizes))), strict=True):
            damaged += found
            done = tuple(map(sum, zip(done, (size, shard.documents, shard.tokens), strict=True)))
            progress.update(done)
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
    """Of each local file that the manifest has them of; a remote one is fetched again as a whole if it differs."""
    if not isinstance(shards.files, LocalFiles) or not (path := shards.files.path(MANIFEST)).exists():
        return {}
    return {entry["file"]: entry.get("blocks_xxh3_64", []) for entry in read_json(path)["shards"]}


def _damage(shards: TokenShards, number: int, blocks: list[str], vocab_size: int | None) -> list[dict]:
    """What is wrong with the files of one shard."""
    shard = shards.shards[number]
    faults = {}
    if shard.xxh3_128:
        faults[shard.file] = _fault(shards, shard.file, lambda path: _fault_of_tokens(path, shard, blocks))
        faults[shard.ends_file] = _fault(shards, shard.ends_file, lambda path: _fault_of_ends(path, shard))
    if vocab_size is not None and not faults.get(shard.file):
        faults[shard.file] = _fault(shards, shard.file, lambda _: check_ids(shards, number, vocab_size))
    shards.close(number)
    return [{"file": file, "fault": fault[0], "bytes": fault[1]} for file, fault in faults.items() if fault]


def _fault(shards: TokenShards, file: str, look: Callable[[Path], Fault | None]) -> Fault | None:
    """What `look` finds in a file, or why it cannot."""
    try:
        return look(shards.files.path(file))
    except FileNotFoundError:
        return "is missing", []
    except (OSError, UserError) as error:
        return str(error), []


def _fault_of_tokens(path: Path, shard: Shard, blocks: list[str]) -> Fault | None:
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


def _fault_of_ends(path: Path, shard: Shard) -> Fault | None:
    if (size := path.stat().st_size) != _ends_bytes(shard):
        return _wrong_size(size, _ends_bytes(shard))
    if hash_file(path).digest() == shard.ends_xxh3_128:
        return None
    fault = ends_fault([np.memmap(path, ENDS_DTYPE, mode="r")], shard.tokens)
    return f"differs from its checksum{f': {fault}' if fault else ''}", []


def _ends_bytes(shard: Shard) -> int:
    return shard.documents * ENDS_DTYPE.itemsize


def _wrong_size(found: int, expected: int) -> Fault:
    """Too short or too long, from the byte where it ends or should."""
    return f"has {found:,} bytes, not {expected:,}", [[min(found, expected), max(found, expected) - 1]]


def _stretches(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    first = 0
    for place in range(1, len(numbers) + 1):
        if place == len(numbers) or numbers[place] != numbers[place - 1] + 1:
            yield numbers[first], numbers[place - 1]
            first = place
