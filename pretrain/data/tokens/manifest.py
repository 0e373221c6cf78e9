"""The manifest of Evenkeel's own shards, written last: a folder that has one is complete. docs/data.md shows one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from pretrain.data.json_files import content_hash, parse_json
from pretrain.data.tokens.corpus import Shard, TokenShards
from pretrain.data.tokens.corpus_files import CorpusFiles
from pretrain.errors import UserError
from pretrain.files import write_text

SCHEMA_VERSION = 2
OLDEST_SCHEMA_VERSION = 1  # it only lacks the checksums of blocks
MANIFEST = "manifest.json"
DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_PLAIN_NAME = re.compile(r"(?!\.\.?$)[^/\\\0]+")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")  # names a file in the cache of remote corpora
_SHARD_FIELDS = ("file", "tokens", "documents", "bytes", "xxh3_128", "ends_file", "ends_xxh3_128")


def write_manifest(folder: Path, dtype: np.dtype, entries: list[dict], description: dict) -> None:
    """Make `folder` a corpus by writing its manifest.

    Args:
        folder: The folder of shards.
        dtype: The dtype of their tokens.
        entries: The manifest's entry for each shard, in order.
        description: Further keys of the manifest.
    """
    head = {
        "schema_version": SCHEMA_VERSION,
        "dtype": dtype.name,
        "tokens": sum(entry["tokens"] for entry in entries),
        "documents": sum(entry["documents"] for entry in entries),
        **description,
    }
    lines = ",".join(f"\n    {json.dumps(entry)}" for entry in entries)
    write_text(folder / MANIFEST, f'{json.dumps(head, indent=2)[:-2]},\n  "shards": [{lines}\n  ]\n}}\n')


def read_manifest(content: bytes, path: str) -> dict:
    """Return the manifest in `content`; UserError, which names `path`, if this trainer does not read its version."""
    manifest = parse_json(content, path)
    version = manifest.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version}, made by a newer Evenkeel; this one reads up to {SCHEMA_VERSION}. "
            "Update Evenkeel, or prepare the data again with this one."
        )
    if version not in range(OLDEST_SCHEMA_VERSION, SCHEMA_VERSION + 1):
        raise UserError(
            f"{path} has schema_version {version!r} and this version of the trainer reads "
            f"{OLDEST_SCHEMA_VERSION} to {SCHEMA_VERSION}. Prepare the data again with tools/prepare_data.py."
        )
    return manifest


def describe_shards(
    manifest: dict, path: str, location: str, files_of: Callable[[list[Shard]], CorpusFiles]
) -> TokenShards:
    """Return the corpus that a manifest describes.

    Args:
        manifest: The manifest.
        path: Its place, for messages.
        location: The folder or URL of the corpus.
        files_of: `files_of(shards)` gives access to the files of the shards.

    Raises:
        UserError: The manifest cannot be a true description.
    """
    try:
        shards = list(map(_shard, manifest["shards"]))
        dtype = DTYPES[manifest["dtype"]]
        corpus = TokenShards(
            location,
            files_of(shards),
            shards,
            dtype,
            content_hash([manifest["dtype"], [(shard.tokens, shard.xxh3_128) for shard in shards]]),
            text_bytes=manifest["text_bytes"],
            vocab_size=manifest["vocab_size"],
            eos_id=manifest["eos_id"],
            tokenizer_fingerprint=manifest["tokenizer_fingerprint"],
            manifest={key: value for key, value in manifest.items() if key != "shards"},
        )
        contradictions = list(_contradictions(manifest, corpus))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a manifest of token shards: {type(error).__name__} {error}. "
            "Restore it, or prepare the data again with tools/prepare_data.py."
        ) from error
    if contradictions:
        raise UserError(f"{path} contradicts itself: {contradictions[0]}. Restore it, or prepare the data again.")
    return corpus


def _shard(entry: dict) -> Shard:
    shard = Shard(**{field: entry[field] for field in _SHARD_FIELDS})
    for name in (shard.file, shard.ends_file):
        if not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"the file name {name!r} leads out of the folder")
    for checksum in (shard.xxh3_128, shard.ends_xxh3_128):
        if not _CHECKSUM.fullmatch(checksum):
            raise ValueError(f"{shard.file} has the checksum {checksum!r}")
    for field in ("tokens", "documents", "bytes"):
        if type(count := getattr(shard, field)) is not int or count <= 0:
            raise ValueError(f"{shard.file} has {count!r} {field}")
    return shard


def _contradictions(manifest: dict, corpus: TokenShards) -> Iterable[str]:
    for field in ("tokens", "documents"):
        if (found := getattr(corpus, field)) != manifest[field]:
            yield f"its shards hold {found} {field} and it says {manifest[field]}"
    for shard in corpus.shards:
        if shard.bytes != shard.tokens * corpus.dtype.itemsize:
            yield f"{shard.file} has {shard.tokens} {corpus.dtype.name} tokens in {shard.bytes} bytes"
        if shard.documents > shard.tokens:
            yield f"{shard.file} has {shard.documents} documents and only {shard.tokens} tokens"
    names = [name for shard in corpus.shards for name in (shard.file, shard.ends_file)]
    if len(set(names)) < len(names):
        yield "it lists a file twice"
    eos_id, vocab_size = manifest["eos_id"], manifest["vocab_size"]
    if not (manifest.get("bos_id") or 0) < vocab_size:
        yield f"bos_id {manifest['bos_id']} is no id of its vocab_size {vocab_size}"
    if not eos_id < vocab_size <= 1 << (8 * corpus.dtype.itemsize):
        yield f"eos_id {eos_id}, vocab_size {vocab_size} and {corpus.dtype.name} do not fit together"
