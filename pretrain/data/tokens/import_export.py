"""Turns token files of other trainers into our shards and back, so that the same bytes come out as went in.

Their formats hold some things that ours does not: files, kinds of number, empty documents. An import keeps them in the
manifest, and an export to the same format restores them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pretrain.data.progress import Progress
from pretrain.data.tokens.atomic_folder import atomic_folder
from pretrain.data.tokens.corpus import TokenShards
from pretrain.data.tokens.external_files import INDEX_BLOCK, IndexedFile, SampledFile, TokenFile, check_one_dtype
from pretrain.data.tokens.formats import FORMATS, format_of
from pretrain.data.tokens.verify import first_bad_id
from pretrain.data.tokens.writer import ShardWriter, token_dtype
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.data.tokenizer import TokenizerInfo

_BLOCK_TOKENS = 1 << 22


@dataclass(frozen=True)
class FilePart:
    """The part of a corpus that is one file elsewhere; `empty_documents` are numbered among all of the file."""

    name: str
    tokens: int
    documents: int
    empty_documents: list[int]


def import_tokens(
    format: str,
    location: str | Path,
    out: str | Path,
    tokenizer: TokenizerInfo,
    *,
    shard_tokens: int = 100_000_000,
    dtype: str | None = None,
) -> None:
    """Make the shard folder `out` of the token files at `location`, in the order of their names.

    Args:
        format: A name in `FORMATS`.
        location: The file, folder or prefix that the format reads.
        out: A new or empty folder.
        tokenizer: The tokenizer that made the tokens.
        shard_tokens: The tokens of a shard, about.
        dtype: The kind of number in OLMo's raw files, "uint16" or "uint32". By default the smaller one that holds the
            tokenizer's vocabulary.

    Raises:
        UserError: Files are damaged, hold ids that the tokenizer does not have, or hold something that shards cannot
            keep; `out` is then not made.
    """
    raw_dtype = np.dtype(dtype or token_dtype(tokenizer.vocab_size)).newbyteorder("<")
    seen = format_of(Path(location))
    if seen and not FORMATS[format].recognizes(Path(location)):
        raise UserError(f"'{location}' looks like files of the format {seen}: use --import {seen}.")
    files = FORMATS[format].read(Path(location), raw_dtype)
    if not any(file.tokens for file in files):
        raise UserError(f"'{location}' holds no {format} files with tokens.")
    check_one_dtype(files)
    with atomic_folder(Path(out)) as temporary:
        writer = ShardWriter(temporary, token_dtype(tokenizer.vocab_size), shard_tokens)
        progress = Progress("imported", sum(file.bytes for file in files))
        beginnings = _Beginnings(None if tokenizer.bos_id == tokenizer.eos_id else tokenizer.bos_id)
        listed = _lists_documents(files, tokenizer.eos_id)
        parts = [_import_file(file, listed, writer, tokenizer, progress, beginnings) for file in files]
        progress.close()
        bos_id = beginnings.of_all()
        writer.finish(
            {
                "text_bytes": None,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "bos_id": bos_id,
                "tokenizer_fingerprint": tokenizer.fingerprint,
                "sources": [
                    {
                        "path": str(file.path),
                        "bytes": [0, file.bytes],
                        "documents": part.documents,
                        "tokens": part.tokens,
                    }
                    for file, part in zip(files, parts, strict=True)
                    if part.documents
                ],
                "shuffle": None,
                "imported": {"format": format, "dtype": files[0].dtype.name, "files": list(map(asdict, parts))},
            }
        )


def export_tokens(format: str, shards: TokenShards, out: str | Path) -> None:
    """Write `shards` to the new folder `out` in another trainer's format.

    Tokens that were imported from that format come out as they went in, file by file. Others make one file
    (megatron, nanogpt: tokens.bin) or one for each shard (datatrove, llmc, olmo).

    Args:
        format: A name in `EXPORTED`.
        shards: The corpus.
        out: A new or empty folder.

    Raises:
        UserError: An id does not fit the format's kind of number; `out` is then not made.
    """
    token_format = FORMATS[format]
    assert token_format.writer is not None
    imported = shards.manifest.get("imported") or {}
    if imported.get("format") == format:
        dtype = np.dtype(imported["dtype"]).newbyteorder("<")
        parts = [FilePart(**file) for file in imported["files"]]
    else:
        dtype = token_format.dtype_for(shards.vocab_size or int(np.iinfo(shards.dtype).max) + 1)
        parts = _parts(shards, token_format.one_file)
    with atomic_folder(Path(out)) as temporary:
        progress = Progress("exported", shards.tokens * dtype.itemsize)
        start = documents = 0
        for part in parts:
            writer = token_format.writer(temporary, part.name, dtype, part.documents, len(part.empty_documents))
            for tokens, ends in _with_empty(_read(shards, start, start + part.tokens), part):
                writer.append(_as(dtype, tokens, format), ends)
                start, documents = start + len(tokens), documents + len(ends)
                progress.update((start * dtype.itemsize, documents, start))
            writer.close()
        progress.close()


class _Beginnings:
    """Counts how many of the documents that pass by begin with a token."""

    def __init__(self, token: int | None) -> None:
        self._token = token
        self._documents = self._begun = 0
        self._at_start = True

    def see(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        """Count the documents among the next tokens, whose ends are `ends`."""
        starts = ends[ends < len(tokens)]
        if self._at_start:
            starts = np.append(starts, 0)
        self._documents += len(starts)
        if self._token is not None:
            self._begun += int((tokens[starts] == self._token).sum())
        self._at_start = len(ends) > 0 and int(ends[-1]) == len(tokens)

    def of_all(self) -> int | None:
        """Return the token if all documents begin with it; if only some do, say so on stderr."""
        if 0 < self._begun < self._documents:
            print(
                f"{self._begun:,} of {self._documents:,} documents begin with the tokenizer's bos_token (id {self._token}). "
                "Since not all do, the manifest says that none does.",
                file=sys.stderr,
                flush=True,
            )
        return self._token if 0 < self._begun == self._documents else None


def _lists_documents(files: Sequence[TokenFile], separator: int) -> bool:
    """Return whether documents end where indexes say; if these list samples, say on stderr what ends documents."""
    if not any(isinstance(file, SampledFile) for file in files):
        return True
    listed = not any((file.map() == separator).any() for file in files)
    rule = "no token is the separator, so each sample is a document" if listed else "documents end at separators"
    print(f"{rule} (id {separator})", file=sys.stderr, flush=True)
    return listed


def _import_file(
    file: TokenFile,
    listed: bool,
    writer: ShardWriter,
    tokenizer: TokenizerInfo,
    progress: Progress,
    beginnings: _Beginnings,
) -> FilePart:
    """Append one file to the shards. `listed`: its index says where documents end."""
    tokens_before, documents_before = writer.tokens, writer.documents
    index = file if listed and isinstance(file, IndexedFile) else None
    for start, tokens, ends in _blocks(file, index, tokenizer.eos_id):
        if (at := first_bad_id(tokens, tokenizer.vocab_size)) is not None:
            raise UserError(
                f"{file.path} has the id {tokens[at]} at token {start + at}{_byte_of(file, start + at)}, "
                f"and the tokenizer has {tokenizer.vocab_size} ids. The file is corrupt, or was made with another "
                "tokenizer."
            )
        writer.append(tokens.astype(writer.dtype, copy=False), ends)
        beginnings.see(tokens, ends)
        progress.update((writer.tokens * file.dtype.itemsize, writer.documents, writer.tokens))
    return FilePart(
        file.path.stem,
        writer.tokens - tokens_before,
        writer.documents - documents_before,
        _empty_documents(index) if index else [],
    )


def _byte_of(file: TokenFile, token: int) -> str:
    """Return the place of a token in words. Where tokens lie among other things, the token's number is all there is."""
    return "" if isinstance(file, SampledFile) else f" (byte {file.offset + token * file.dtype.itemsize})"


def _blocks(file: TokenFile, index: IndexedFile | None, separator: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first token, tokens, document ends counted from it) of a file from its beginning, block by block.

    Documents end as `index` says, at separators where it is None.
    """
    tokens = file.map()
    if index is None:
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            block = tokens[start : start + _BLOCK_TOKENS]
            ends = np.flatnonzero(block == separator) + 1
            if start + len(block) == len(tokens) and (not len(ends) or ends[-1] != len(block)):
                ends = np.append(ends, len(block))  # the end of a file ends its last document
            yield start, block, ends
        return
    start = 0
    for ends in _all_ends(index):
        held = ends[np.diff(ends, prepend=start) > 0]
        if len(held):
            yield from _in_blocks(tokens, start, held)
            start = int(held[-1])


def _in_blocks(tokens: np.ndarray, start: int, ends: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first token, tokens, document ends counted from it) from `start` to the last of `ends`."""
    for first in range(start, int(ends[-1]), _BLOCK_TOKENS):
        block = tokens[first : min(first + _BLOCK_TOKENS, int(ends[-1]))]
        among = slice(*np.searchsorted(ends, [first, first + len(block)], side="right"))
        yield first, block, ends[among] - first


def _all_ends(file: IndexedFile) -> Iterator[np.ndarray]:
    """Yield the document ends of a file, int64, as its index has them, some at a time."""
    for first in range(0, file.boundaries.documents, INDEX_BLOCK):
        yield file.boundaries.ends(first, min(first + INDEX_BLOCK, file.boundaries.documents))


def _empty_documents(file: IndexedFile) -> list[int]:
    """Return the numbers of the empty documents that the index of a file lists."""
    empty: list[int] = []
    first, last = 0, 0
    for ends in _all_ends(file):
        empty += (first + np.flatnonzero(np.diff(ends, prepend=last) == 0)).tolist()
        first, last = first + len(ends), int(ends[-1])
    return empty


def _parts(shards: TokenShards, one_file: bool) -> list[FilePart]:
    if one_file:
        return [FilePart("tokens", shards.tokens, shards.documents, [])]
    return [
        FilePart(f"tokens_{number:05d}", shard.tokens, shard.documents, [])
        for number, shard in enumerate(shards.shards)
    ]


def _read(shards: TokenShards, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (tokens, document ends counted from `start`) of tokens start .. stop - 1 of all shards, block by block."""
    shard_start = 0
    for number, shard in enumerate(shards.shards):
        first, last = max(start - shard_start, 0), min(stop - shard_start, shard.tokens)
        if first < last:
            ends = shards.open_ends(number)
            among = slice(*np.searchsorted(ends, [first, last], side="right"))
            for at, tokens, found in _in_blocks(shards.open_tokens(number), first, ends[among]):
                yield tokens, found + (shard_start + at - start)
            shards.close(number)
        shard_start += shard.tokens


def _with_empty(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], part: FilePart
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the blocks with the ends of the part's empty documents put back: each repeats the end before it."""
    # Empty document k of the file is the j-th empty one, so k - j documents with tokens come before it.
    before = np.array(part.empty_documents, np.int64) - np.arange(len(part.empty_documents))
    documents = last = 0
    for tokens, ends in blocks:
        here = before[(before >= documents) & (before < documents + len(ends))] - documents
        documents += len(ends)
        repeated = np.concatenate([[last], ends[:-1]])[here] if len(ends) else ends
        last = int(ends[-1]) if len(ends) else last
        yield tokens, np.insert(ends, here, repeated)
    trailing = np.count_nonzero(before >= documents)
    if trailing:
        yield np.empty(0, np.uint16), np.full(trailing, last)


def _as(dtype: np.dtype, tokens: np.ndarray, format: str) -> np.ndarray:
    if (at := first_bad_id(tokens, int(np.iinfo(dtype).max) + 1)) is not None:
        raise UserError(f"the id {tokens[at]} does not fit in the {dtype.name} tokens of the format {format}.")
    return np.ascontiguousarray(tokens, dtype)
