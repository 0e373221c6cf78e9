"""Opening a corpus of token files, whatever its format, after checking that it is what it says."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.remote.cache import CachedFiles, CacheSettings
from pretrain.data.remote.storage import Storage, is_remote
from pretrain.data.tokens.corpus import ENDS_DTYPE, Shard, TokenShards
from pretrain.data.tokens.corpus_files import LocalFiles
from pretrain.data.tokens.external_files import check_one_dtype
from pretrain.data.tokens.external_shards import ExternalShards
from pretrain.data.tokens.formats import FORMATS, format_of
from pretrain.data.tokens.manifest import MANIFEST, describe_shards, read_manifest
from pretrain.data.tokens.verify import check_contents, check_ids, check_sizes
from pretrain.errors import UserError

__all__ = ["TokenShards", "open_shards"]


def open_shards(
    location: str | Path,
    verify: str = "full",
    *,
    rank: int = 0,
    world_size: int = 1,
    vocab_size: int | None = None,
    cache: CacheSettings | None = None,
) -> TokenShards:
    """Open the corpus at `location`.

    Args:
        location: A folder or URL of Evenkeel's shards, a Megatron prefix or folder, or a datatrove folder.
        verify: "size" checks that every file is there with its size. "full" also checks its checksum, or, in a format
            that has none, that every id is below `vocab_size`.
        rank: The number of this process among those that share the check. Rank r of R checks shards r, r + R, ...
        world_size: How many processes share the check.
        vocab_size: The number of ids of the run's tokenizer, for formats that do not say.
        cache: The local cache of a remote corpus. Remote files are checked when they come into it.

    Raises:
        UserError: There is no corpus at `location`, or it is damaged. It may be raised on one rank only: the caller
            informs the others.
    """
    if verify not in ("full", "size"):
        raise ValueError(f"verify is 'full' or 'size', not {verify!r}")
    location = str(location).removeprefix("file://")
    share = slice(rank, None, world_size)
    if is_remote(location):
        return _open_remote(location, cache)
    if (Path(location) / MANIFEST).exists():
        return _open_own(location, verify, share)
    shards = _open_external(location)
    if verify == "full" and vocab_size is not None:
        for number in range(len(shards.shards))[share]:
            check_ids(shards, number, vocab_size)
            shards.close(number)
    return shards


def _open_own(location: str, verify: str, share: slice) -> TokenShards:
    path = Path(location) / MANIFEST
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}. Restore the file, or make its folder again.") from error
    manifest = read_manifest(content, str(path))
    shards = describe_shards(manifest, str(path), location, lambda _: LocalFiles(Path(location)))
    check_sizes(shards, share)
    if verify == "full":
        check_contents(shards, manifest, share)
    return shards


def _open_remote(location: str, cache: CacheSettings | None) -> TokenShards:
    if cache is None:
        raise UserError(f"'{location}' is remote and no cache is named for its shards. Copy them to a local folder.")
    path = f"{location.rstrip('/')}/{MANIFEST}"
    try:
        content = Storage(location).read_bytes(MANIFEST)
    except UserError as error:
        raise UserError(
            f"{error} Only Evenkeel's own shards are read from a URL: copy or import those of other formats."
        ) from error

    def cached(shards: list[Shard]) -> CachedFiles:
        expected = {shard.file: (shard.bytes, shard.xxh3_128) for shard in shards}
        for shard in shards:
            expected[shard.ends_file] = (shard.documents * ENDS_DTYPE.itemsize, shard.ends_xxh3_128)
        return CachedFiles(location, expected, cache)

    return describe_shards(read_manifest(content, path), path, location, cached)


def _open_external(location: str) -> TokenShards:
    path = Path(location)
    for format in FORMATS.values():
        if format.find and (files := format.find(path)):
            check_one_dtype(files)
            if not any(file.tokens for file in files):
                raise UserError(f"the {format.name} files at '{location}' hold no tokens.")
            return ExternalShards(location, format.name, files)
    raise _not_a_corpus(path)


def _not_a_corpus(path: Path) -> UserError:
    if (path / "train" / MANIFEST).exists():
        return UserError(f"'{path}' holds train and val; name one of them: '{path / 'train'}'.")
    if path.is_file() or format_of(path):
        imported = " or ".join(format.name for format in FORMATS.values() if not format.find)
        return UserError(
            f"'{path}' holds tokens that are not read in place, because no index says where their documents end. Import "
            f"them: tools/prepare_data.py --import {format_of(path) or imported}."
        )
    return UserError(
        f"'{path}' is not a folder of finished token shards: it has no {MANIFEST}. Make one with "
        "tools/prepare_data.py; if its preparation was interrupted, run the same command again to complete it."
    )
