"""Opening a corpus of token files, whatever its format, after checking that it is what it says."""

from __future__ import annotations

from pathlib import Path

from pretrain.data.remote.cache import CachedFiles, CacheSettings
from pretrain.data.remote.storage import Storage, is_remote
from pretrain.data.tokens import datatrove, megatron
from pretrain.data.tokens.corpus import ENDS_DTYPE, Shard, TokenShards
from pretrain.data.tokens.external_files import ForeignShards, check_one_dtype
from pretrain.data.tokens.files import LocalFiles
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
    """The corpus at `location`: a folder or URL of Evenkeel's shards, a Megatron prefix or folder, a datatrove folder.

    `verify="size"` checks that every file is there with its size; `"full"` also its checksum, or, in a format that has
    none, that every id is below `vocab_size`. Ranks share this: rank r of R takes shards r, r + R, ..., so what is
    wrong may be a UserError on one rank only; tell the others. Remote files are checked when they come into `cache`.
    """
    if verify not in ("full", "size"):
        raise ValueError(f"verify is 'full' or 'size', not {verify!r}")
    location = str(location).removeprefix("file://")
    share = slice(rank, None, world_size)
    if is_remote(location):
        return _open_remote(location, cache)
    if (Path(location) / MANIFEST).exists():
        return _open_own(location, verify, share)
    shards = _open_foreign(location)
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
        raise UserError(f"cannot read {path}: {error}. Restore the file, or make its folder anew.") from error
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


def _open_foreign(location: str) -> TokenShards:
    path = Path(location)
    format, files = "megatron", megatron.token_files(path)
    if not files:
        format, files = "datatrove", datatrove.token_files(path)
    if not files:
        raise _not_a_corpus(path)
    check_one_dtype(files)
    if not any(file.tokens for file in files):
        raise UserError(f"the {format} files at '{location}' hold no tokens.")
    return ForeignShards(location, format, files)


def _not_a_corpus(path: Path) -> UserError:
    if (path / "train" / MANIFEST).exists():
        return UserError(f"'{path}' holds train and val; name one of them: '{path / 'train'}'.")
    if path.is_file() or any(path.glob("*.npy")):
        return UserError(
            f"'{path}' holds tokens without an index, which do not say where documents end. Import them: "
            "tools/prepare_data.py --import nanogpt or olmo."
        )
    return UserError(
        f"'{path}' is not a folder of finished token shards: it has no {MANIFEST}. Make one with "
        "tools/prepare_data.py; if its preparation was interrupted, run the same command again to complete it."
    )
