"""litdata, Lightning's folders of samples: import only. A sample is one tensor or array of tokens, and nothing else.

Source: litdata, litdata/streaming/writer.py and TokensLoader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pretrain.data.tokens.external_files import ListedEnds, SampledFile, TokenFormat
from pretrain.data.tokens.samples import content_of, entries_of, index_of, listed_file, lists_samples, sample_offsets
from pretrain.errors import UserError

# litdata's codes of number kinds: those of tensors, and those of NumPy arrays.
_TENSORS = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
_ARRAYS = dict(enumerate(("i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8")))


def litdata_files(location: Path) -> list[SampledFile]:
    """Return the files that the index at `location` lists; UserError if one is damaged or its tokens cannot be read."""
    index = index_of(location)
    chunks, dtype = entries_of(index, "chunks"), _kind(index)
    return [_file(index, chunk, dtype) for chunk in chunks]


LITDATA = TokenFormat(
    name="litdata",
    read=lambda location, _: litdata_files(location),
    recognizes=lambda location: lists_samples(location, "chunks"),
)


def _kind(index: Path) -> np.dtype:
    config = content_of(index).get("config")
    if not isinstance(config, dict):
        raise UserError(f"{index} has no mapping 'config', which says what the samples are. It is corrupt: restore it.")
    if config.get("compression") or config.get("encryption"):
        raise UserError(f"{index} says that the data set is compressed or encrypted. Make it again without that.")
    formats = config.get("data_format")
    one = formats[0] if isinstance(formats, list) and len(formats) == 1 else ""
    kind, _, code = str(one).partition(":")
    codes = {"no_header_tensor": _TENSORS, "no_header_numpy": _ARRAYS}.get(kind, {})
    if not code.isdecimal() or int(code) not in codes:
        raise UserError(
            f"{index} has samples of {formats}, and only those are read that are one tensor or array of integers, as "
            "litdata's TokensLoader reads them."
        )
    return np.dtype(codes[int(code)])


def _file(index: Path, chunk: dict[str, Any], dtype: np.dtype) -> SampledFile:
    path = listed_file(index, chunk.get("filename"))
    offsets = sample_offsets(path, chunk.get("chunk_size"), chunk.get("chunk_bytes"))
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
