"""Folders of samples, MosaicML's MDS and Lightning's litdata: a JSON index and files of samples, whose tokens are imported.

A sample is a document in some data sets, and a fixed number of tokens cut from the stream of documents in others. The files
do not say which. So an import ends documents at separators if the files have any, and else at the ends of samples.

Sources: mosaicml-streaming, streaming/base/format/mds (index version 2); litdata, litdata/streaming/writer.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokens.external_files import ListedEnds, SampledFile, TokenFormat
from pretrain.errors import UserError

INDEX = "index.json"
_COLUMNS = ("tokens", "input_ids")  # that LLM Foundry and others write
_INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
# litdata's codes of number kinds: those of tensors, and those of NumPy arrays.
_LITDATA_TENSORS = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_LITDATA_ARRAYS = dict(enumerate(("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8")))


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
        return np.concatenate(parts).view(self.dtype)


def mds_files(folder: Path) -> list[SampledFile]:
    """Return the files that `folder`/index.json lists; UserError where one is damaged or its tokens cannot be read."""
    index = folder / INDEX
    shards = _list_in(index, "shards")
    return [_mds_file(index, folder, shard) for shard in shards]


def litdata_files(folder: Path) -> list[SampledFile]:
    """Return the files that `folder`/index.json lists; UserError where one is damaged or its tokens cannot be read."""
    index = folder / INDEX
    chunks, dtype = _list_in(index, "chunks"), _litdata_kind(index)
    return [_litdata_file(folder, chunk, dtype) for chunk in chunks]


MDS = TokenFormat(
    name="mds",
    read=lambda location, _: mds_files(_folder(location)),
    recognizes=lambda location: _holds(location, "shards"),
)
LITDATA = TokenFormat(
    name="litdata",
    read=lambda location, _: litdata_files(_folder(location)),
    recognizes=lambda location: _holds(location, "chunks"),
)


def _folder(location: Path) -> Path:
    return location.parent if location.name == INDEX else location


def _holds(location: Path, key: str) -> bool:
    index = _folder(location) / INDEX
    return index.is_file() and key in _content(index)


def _content(index: Path) -> dict[str, Any]:
    try:
        content = json.loads(index.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {index}: {error}. Name the folder that has it, and restore it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{index} is not the index of a data set: it holds no mapping.")
    return content


def _list_in(index: Path, key: str) -> list[dict[str, Any]]:
    entries = _content(index).get(key)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{index} has no list '{key}', so it is an index of another kind.")
    return entries


def _path_in(folder: Path, name: object, listed: Path) -> Path:
    path = folder / str(name)
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{listed} names the file {name!r}, which lies outside of its folder.")
    if not path.is_file():
        raise UserError(f"{path} is missing, and {listed} names it. Restore it.")
    return path


def _offsets(path: Path, samples: object, size_bytes: object) -> np.ndarray:
    """Return where samples begin in a file and the last one ends, in bytes, (samples + 1,) int64, checked."""
    found = path.stat().st_size
    if found != size_bytes:
        raise UserError(f"{path} has {found} bytes and its index says {size_bytes}. It was cut or changed: restore it.")
    head = np.fromfile(path, "<u4", count=1)
    offsets = np.fromfile(path, "<u4", count=int(head[0]) + 1, offset=4).astype(np.int64) if len(head) else head
    if len(head) == 0 or int(head[0]) != samples or len(offsets) != int(head[0]) + 1:
        raise UserError(f"{path} has another number of samples than the {samples} of its index: restore it.")
    if np.diff(offsets).min(initial=0) < 0 or offsets[-1] > found or offsets[0] < 4 + 4 * len(offsets):
        raise UserError(f"{path} is corrupt: the places of its samples are not in order, or lie outside of the file.")
    return offsets


def _mds_file(index: Path, folder: Path, shard: dict[str, Any]) -> MdsFile:
    raw = shard.get("raw_data") or {}
    if shard.get("version") != 2 or shard.get("format") != "mds":
        raise UserError(
            f"{index} lists a shard of format {shard.get('format')!r}, version {shard.get('version')!r}. "
            "Only mds, version 2, is read."
        )
    zipped = (shard.get("zip_data") or {}).get("basename")
    if zipped and not (folder / str(raw.get("basename"))).exists():
        raise UserError(f"{folder / zipped} is compressed ({shard.get('compression')}). Decompress the files first.")
    path = _path_in(folder, raw.get("basename"), index)
    offsets = _offsets(path, shard.get("samples"), raw.get("bytes"))
    column = _token_column(index, shard)
    dtype, shape = _mds_kind(index, shard["column_encodings"][column])
    starts, lengths = _places(path, offsets, shard["column_sizes"], column, dtype, shape)
    return MdsFile(path, dtype, int(lengths.sum()), ListedEnds(np.cumsum(lengths)), index, starts)


def _token_column(index: Path, shard: dict[str, Any]) -> int:
    names, encodings = shard["column_names"], shard["column_encodings"]
    arrays = [name for name, encoding in zip(names, encodings, strict=True) if str(encoding).startswith("ndarray")]
    for name in (*_COLUMNS, *(arrays if len(arrays) == 1 else ())):
        if name in names:
            return int(names.index(name))
    columns = ", ".join(f"{name} ({encoding})" for name, encoding in zip(names, encodings, strict=True))
    raise UserError(f"{index} has the columns {columns}, of which none is called {' or '.join(_COLUMNS)}.")


def _mds_kind(index: Path, encoding: str) -> tuple[np.dtype, int | None]:
    """Return the kind of number and the tokens of a sample, None where each sample says it."""
    kind, _, rest = str(encoding).partition(":")
    name, _, shape = rest.partition(":")
    if kind != "ndarray" or name not in _INTEGERS:
        raise UserError(
            f"{index} has its tokens as '{encoding}', which does not say that they are integers of one kind. Only columns "
            "'ndarray:int32' and the like are read: write the data set again with such a column."
        )
    size = int(np.prod([int(part) for part in shape.split(",")])) if shape else None
    return np.dtype(name).newbyteorder("<"), size


def _places(
    path: Path, offsets: np.ndarray, sizes: Sequence[int | None], column: int, dtype: np.dtype, shape: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the byte at which each sample's tokens begin, and their number, (samples,) int64 each.

    A sample is the sizes of its columns that have no fixed one (uint32), and then the columns. A column of tokens without a
    fixed shape begins with a byte, the number of dimensions and in the two low bits the width of their sizes, and the sizes.
    """
    raw = np.asarray(np.memmap(path, np.uint8, mode="r"))
    open_columns = [number for number, size in enumerate(sizes) if not size]
    starts, lengths = (np.empty(len(offsets) - 1, np.int64) for _ in range(2))
    for sample, (first, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        body = first + 4 * len(open_columns)
        given = raw[first:body].view("<u4") if body <= stop else np.empty(0, "<u4")
        whole = dict(zip(open_columns, given.tolist(), strict=False))
        widths = [size or whole.get(number, 0) for number, size in enumerate(sizes)]
        start, width = body + sum(widths[:column]), widths[column]
        if shape is None and start < stop:
            described = 1 + (int(raw[start]) >> 2) * 2 ** (int(raw[start]) & 3)
            start, width = start + described, width - described
        if (
            body + sum(widths) != stop
            or width < 0
            or width % dtype.itemsize
            or shape not in (None, width // dtype.itemsize)
        ):
            raise UserError(f"{path} is corrupt: sample {sample} (byte {first}) is not as its columns say. Restore it.")
        starts[sample], lengths[sample] = start, width // dtype.itemsize
    return starts, lengths


def _litdata_kind(index: Path) -> np.dtype:
    config = _content(index).get("config") or {}
    if config.get("compression") or config.get("encryption"):
        raise UserError(f"{index} says that the data set is compressed or encrypted. Make it again without that.")
    formats = config.get("data_format") or []
    kind, _, code = str(formats[0] if len(formats) == 1 else "").partition(":")
    codes = {"no_header_tensor": _LITDATA_TENSORS, "no_header_numpy": _LITDATA_ARRAYS}.get(kind, {})
    if not code.isdigit() or int(code) not in codes:
        raise UserError(
            f"{index} has samples of {formats}, and only those are read that are one tensor or array of integers, as "
            "litdata's TokensLoader reads them."
        )
    return np.dtype(codes[int(code)])


def _litdata_file(folder: Path, chunk: dict[str, Any], dtype: np.dtype) -> SampledFile:
    index = folder / INDEX
    path = _path_in(folder, chunk.get("filename"), index)
    offsets = _offsets(path, chunk.get("chunk_size"), chunk.get("chunk_bytes"))
    lengths = np.diff(offsets)
    if (lengths % dtype.itemsize).any() or offsets[-1] != path.stat().st_size:
        raise UserError(
            f"{path} holds samples that are not whole numbers of {dtype.name} tokens. It is corrupt: restore it."
        )
    tokens = int(lengths.sum()) // dtype.itemsize
    if chunk.get("dim") not in (None, tokens):
        raise UserError(f"{path} has {tokens} tokens and {index} says {chunk['dim']}. One of the two was changed.")
    ends = ListedEnds(np.cumsum(lengths) // dtype.itemsize)
    return SampledFile(path, dtype, tokens, ends, index, offset=int(offsets[0]))
