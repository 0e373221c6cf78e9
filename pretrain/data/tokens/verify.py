"""Checks of a corpus before training: files of the right size, the right content, ids within the vocabulary."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pretrain.data.tokens.checksums import BLOCK_BYTES, BlockHasher, hash_file
from pretrain.data.tokens.corpus import ENDS_DTYPE, Shard, TokenShards
from pretrain.errors import UserError

_SCAN_TOKENS = 1 << 20


def check_sizes(shards: TokenShards, share: slice) -> None:
    """Raise UserError unless every file of the shards in `share` is there with the size that the manifest gives."""
    for shard in shards.shards[share]:
        _check_size(shards.files.path(shard.file), shard.bytes)
        _check_size(shards.files.path(shard.ends_file), shard.documents * ENDS_DTYPE.itemsize)


def check_contents(shards: TokenShards, manifest: dict, share: slice) -> None:
    """Raise UserError unless the shards in `share` have their checksums, and document ends and ids that fit."""
    for number in range(len(shards.shards))[share]:
        shard = shards.shards[number]
        blocks = manifest["shards"][number].get("blocks_xxh3_64", [])
        _check_tokens(shards.files.path(shard.file), shard, blocks)
        _check_ends(shards.files.path(shard.ends_file), shard)
        check_ids(shards, number, manifest["vocab_size"])
        shards.close(number)


def check_ids(shards: TokenShards, number: int, vocab_size: int) -> None:
    """Raise UserError, naming the file and the token, unless every id of one shard is in 0 .. vocab_size - 1."""
    shard, tokens = shards.shards[number], shards.open_tokens(number)
    for start in range(0, len(tokens), _SCAN_TOKENS):
        at = first_bad_id(tokens[start : start + _SCAN_TOKENS], vocab_size)
        if at is not None:
            place = shard.first_token + start + at
            raise UserError(
                f"{shards.files.path(shard.file)} has the id {tokens[start + at]} at token {place} (byte "
                f"{place * shards.dtype.itemsize}), and the vocabulary has {vocab_size} ids. The file is corrupt, or "
                "was made with another tokenizer."
            )


def first_bad_id(tokens: np.ndarray, vocab_size: int) -> int | None:
    """Return the place of the first token that is not in 0 .. vocab_size - 1; None if all are."""
    kind = np.iinfo(tokens.dtype)
    if (kind.min == 0 and kind.max < vocab_size) or not len(tokens):
        return None
    if tokens.max() < vocab_size and (kind.min == 0 or tokens.min() >= 0):
        return None
    return int(np.argmax((tokens < 0) | (tokens >= vocab_size)))


def _check_size(path: Path, expected_bytes: int) -> None:
    if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(path.parent)):
        raise UserError(
            f"{path} is a link that leads out of the folder, whose manifest describes only what is in it. Copy the "
            "file there, or move the whole folder and link to that."
        )
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing, though the manifest beside it lists it. Restore it or prepare the data again."
        ) from None
    if found != expected_bytes:
        raise UserError(
            f"{path} has {found} bytes and the manifest beside it says {expected_bytes}. "
            "The file was cut or changed: restore it or prepare the data again."
        )


def _check_tokens(path: Path, shard: Shard, blocks: list[str]) -> None:
    found = hash_file(path)
    if found.digest() != shard.xxh3_128:
        raise UserError(
            f"{path} has the checksum {found.digest()} and the manifest beside it says {shard.xxh3_128}: "
            f"{_damage(found, blocks, shard.bytes)}. Restore it or prepare the data again."
        )


def _damage(found: BlockHasher, expected: list[str], size_bytes: int) -> str:
    """Return a sentence about which bytes of a file differ, as far as its blocks show."""
    differ = [number for number, pair in enumerate(zip(found.blocks(), expected, strict=False)) if pair[0] != pair[1]]
    if not differ:
        return "the file is corrupt"
    first = differ[0] * BLOCK_BYTES
    others = f" and {len(differ) - 1} other blocks of {BLOCK_BYTES} bytes" if len(differ) > 1 else ""
    return f"the file is corrupt at bytes {first} to {min(first + BLOCK_BYTES, size_bytes) - 1}{others}"


def _check_ends(path: Path, shard: Shard) -> None:
    found = hash_file(path).digest()
    ends = np.memmap(path, ENDS_DTYPE, mode="r")
    if fault := ends_fault([ends], shard.tokens):
        raise UserError(f"{path} is corrupt: {fault}. Restore it or prepare the data again.")
    if found != shard.ends_xxh3_128:
        raise UserError(
            f"{path} has the checksum {found} and the manifest beside it says {shard.ends_xxh3_128}. "
            "The file is corrupt: restore it or prepare the data again."
        )


def ends_fault(parts: Iterable[np.ndarray], tokens: int) -> str | None:
    """Return what is wrong with document ends that should increase strictly from above 0 to `tokens`; None if nothing."""
    before, at = 0, 0
    for part in parts:
        for start in range(0, len(part), _SCAN_TOKENS):
            block = part[start : start + _SCAN_TOKENS]
            falls = np.flatnonzero(block <= np.concatenate([[before], block[:-1]]).astype(block.dtype))
            if len(falls):
                return f"document {at + falls[0]} ends at token {block[falls[0]]}, not after the one before it"
            before, at = block[-1], at + len(block)
    return None if before == tokens else f"the last document ends at token {before} of {tokens}"
