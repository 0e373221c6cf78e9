"""MDS, MosaicML's folders of samples: import only. A sample has columns, and one of them holds its tokens.

Source: mosaicml-streaming, streaming/base/format/mds (index version 2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokens.external_files import ListedEnds, SampledFile, TokenFormat
from pretrain.data.tokens.samples import entries_of, index_of, listed_file, lists_samples, sample_offsets
from pretrain.errors import UserError

_TOKENS = ("tokens", "input_ids")  # the columns that LLM Foundry and others write
_INTEGERS = re.compile(
    r"ndarray:(u?int(?:8|16|32|64))(?::(\d+(?:,\d+)*))?"
)  # the kind, and the shape where it is fixed


@dataclass(frozen=True)
class MdsFile(SampledFile):
    """One .mds file, whose samples hold other things besides tokens.

    Attributes:
        starts: the byte at which each sample's tokens begin, (samples,) int64.
    """

    starts: np.ndarray

    def map(self) -> np.ndarray:
        """Return its tokens, (tokens,) `dtype`, gathered into memory: a file is some 64 MB."""
        raw = np.asarray(np.memmap(self.path, np.uint8, mode="r"))
        lengths = np.diff(self.boundaries.ends(0, self.boundaries.documents), prepend=0) * self.dtype.itemsize
        parts = [raw[start : start + length] for start, length in zip(self.starts, lengths, strict=True)]
        return np.concatenate([raw[:0], *parts]).view(self.dtype)  # also of a file without samples


@dataclass(frozen=True)
class _Column:
    """A column of the samples of a file.

    Attributes:
        encoding: the kind of what it holds.
        size: of it in bytes; None where each sample says it.
    """

    name: str
    encoding: str
    size: int | None


def mds_files(location: Path) -> list[SampledFile]:
    """Return the files that the index at `location` lists; UserError if one is damaged or its tokens cannot be read."""
    index = index_of(location)
    return [_file(index, shard) for shard in entries_of(index, "shards")]


MDS = TokenFormat(
    name="mds",
    read=lambda location, _: mds_files(location),
    recognizes=lambda location: lists_samples(location, "shards"),
)


def _file(index: Path, shard: dict[str, Any]) -> MdsFile:
    if shard.get("version") != 2 or shard.get("format") != "mds":
        raise UserError(
            f"{index} lists a shard of format {shard.get('format')!r}, version {shard.get('version')!r}. "
            "Only mds, version 2, is read."
        )
    raw, zipped = _mapping(index, shard, "raw_data"), _mapping(index, shard, "zip_data").get("basename")
    if zipped and not (index.parent / str(raw.get("basename"))).exists():
        raise UserError(
            f"{index.parent / str(zipped)} is compressed ({shard.get('compression')}). Decompress the files first."
        )
    path = listed_file(index, raw.get("basename"))
    offsets = sample_offsets(path, shard.get("samples"), raw.get("bytes"))
    columns = _columns(index, shard)
    place = _place_of_tokens(index, columns)
    dtype, count = _kind(index, columns[place].encoding)
    starts, lengths = _tokens_of_samples(path, offsets, columns, place, dtype, count)
    return MdsFile(path, dtype, int(lengths.sum()), ListedEnds(np.cumsum(lengths)), index, starts)


def _mapping(index: Path, shard: dict[str, Any], key: str) -> dict[str, Any]:
    found = shard.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(
            f"{index} has a shard whose {key} is {found!r}, and a mapping was due. It is corrupt: restore it."
        )
    return found


def _columns(index: Path, shard: dict[str, Any]) -> list[_Column]:
    given = (shard.get(f"column_{key}") for key in ("names", "encodings", "sizes"))
    lists = [each for each in given if isinstance(each, list)]
    same_length = len(lists) == 3 and len({len(each) for each in lists}) == 1
    if not same_length or not all(size is None or isinstance(size, int) for size in lists[2]):
        raise UserError(
            f"{index} has a shard whose column_names, column_encodings and column_sizes are not lists of one length, the last "
            "one of whole numbers. It is corrupt: restore it."
        )
    return [_Column(str(name), str(encoding), size) for name, encoding, size in zip(*lists, strict=True)]


def _place_of_tokens(index: Path, columns: list[_Column]) -> int:
    """Return the place of the column of tokens: by its name, or as the only array among the columns."""
    arrays = [column.name for column in columns if column.encoding.startswith("ndarray")]
    names = [column.name for column in columns]
    for name in (*_TOKENS, *(arrays if len(arrays) == 1 else ())):
        if name in names:
            return names.index(name)
    listed = ", ".join(f"{column.name} ({column.encoding})" for column in columns)
    raise UserError(f"{index} has the columns {listed}, of which none is called {' or '.join(_TOKENS)}.")


def _kind(index: Path, encoding: str) -> tuple[np.dtype, int | None]:
    """Return the kind of number and the tokens of a sample, None where each sample says it."""
    found = _INTEGERS.fullmatch(encoding)
    if found is None:
        raise UserError(
            f"{index} has its tokens as '{encoding}', which does not say that they are integers of one kind. Only columns "
            "'ndarray:int32' and the like are read: write the data set again with such a column."
        )
    shape = found[2] and [int(size) for size in found[2].split(",")]
    return np.dtype(found[1]).newbyteorder("<"), int(np.prod(shape)) if shape else None


def _tokens_of_samples(
    path: Path, offsets: np.ndarray, columns: list[_Column], place: int, dtype: np.dtype, count: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the byte at which each sample's tokens begin, and their number, (samples,) int64 each.

    A sample is the sizes of its columns that have no fixed one (uint32), and then the columns. A column of tokens without a
    fixed shape begins with a byte, the number of dimensions and in the two low bits the width of their sizes, and the sizes.
    """
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    open_columns = [number for number, column in enumerate(columns) if not column.size]
    starts, lengths = (np.empty(len(offsets) - 1, np.int64) for _ in range(2))
    for sample, (first, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        body = first + 4 * len(open_columns)
        given = raw[first:body].view("<u4") if body <= stop else np.empty(0, "<u4")
        whole = dict(zip(open_columns, given.tolist(), strict=False))
        widths = [column.size or whole.get(number, 0) for number, column in enumerate(columns)]
        start, width = body + sum(widths[:place]), widths[place]
        if count is None and start < stop:
            described = 1 + (int(raw[start]) >> 2) * 2 ** (int(raw[start]) & 3)
            start, width = start + described, width - described
        if (
            body + sum(widths) != stop
            or width < 0
            or width % dtype.itemsize
            or count not in (None, width // dtype.itemsize)
        ):
            raise UserError(f"{path} is corrupt: sample {sample} (byte {first}) is not as its columns say. Restore it.")
        starts[sample], lengths[sample] = start, width // dtype.itemsize
    return starts, lengths
