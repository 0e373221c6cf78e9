"""datatrove's format: a folder of token files, each with an index and metadata.

NAME.ds holds raw uint16 or uint32 tokens. NAME.ds.index says where each document ends, in tokens (uint64). The first
line of NAME.ds.metadata is "tokenizer|bytes per token", the second the number of tokens. All numbers are little-endian.
Source: datatrove/pipeline/tokens/tokenizer.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.tokens.external_files import IndexedFile, ListedEnds, TokenFormat, check_boundaries
from pretrain.errors import UserError

KINDS: dict[int, np.dtype] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


def token_files(folder: Path) -> list[IndexedFile]:
    """Return the .ds files in `folder`, by name, checked against their indexes; [] if there are none.

    Empty files, which workers without text leave, are passed over. UserError, naming the file, when a file and its
    index or metadata do not fit.
    """
    return [_token_file(path) for path in sorted(folder.glob("*.ds")) if path.stat().st_size]


class DatatroveWriter:
    """Writes folder/NAME.ds with its index and metadata."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, documents: int, empty: int) -> None:
        self.dtype = dtype
        self._path = folder / f"{name}.ds"
        self._tokens = 0
        self._file = open(self._path, "wb")  # noqa: SIM115 - closed by close()
        self._index = open(f"{self._path}.index", "wb")  # noqa: SIM115

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self._file.write(tokens.data)
        self._index.write(ends.astype("<u8").tobytes())
        self._tokens += len(tokens)

    def close(self) -> None:
        self._file.close()
        self._index.close()
        metadata = f"Unknown Tokenizer|{self.dtype.itemsize}\n{self._tokens}\n{self._tokens} T"
        Path(f"{self._path}.metadata").write_text(metadata, encoding="utf-8")


DATATROVE = TokenFormat(
    name="datatrove",
    read=lambda location, _: token_files(location),
    writer=DatatroveWriter,
    find=token_files,
    recognizes=lambda location: any(location.glob("*.ds")),
)


def _token_file(path: Path) -> IndexedFile:
    index, metadata, loss = (Path(f"{path}.{suffix}") for suffix in ("index", "metadata", "loss"))
    if not index.is_file():
        raise UserError(f"{path} has no {index.name}, so nothing says where its documents end. Restore it.")
    if loss.exists():
        raise UserError(f"{loss} masks tokens from the loss, which is not read. Remove it to train on all tokens.")
    size_bytes, index_bytes = path.stat().st_size, index.stat().st_size
    if index_bytes == 0 or index_bytes % 8:
        raise UserError(
            f"{index} has {index_bytes} bytes, which is no list of document ends (8 bytes each). Restore it."
        )
    ends = ListedEnds(np.asarray(np.memmap(index, "<u8", mode="r")))
    dtype = _kind_in(metadata) if metadata.exists() else KINDS.get(size_bytes // max(1, int(ends.listed[-1])))
    if dtype is None or size_bytes % dtype.itemsize:
        raise UserError(
            f"{path} has {size_bytes} bytes and {index.name} says {ends.listed[-1]} tokens, which are neither of 2 nor "
            "of 4 bytes. One of the two was cut or changed: restore it."
        )
    check_boundaries(index, ends, size_bytes // dtype.itemsize)
    return IndexedFile(path, dtype, size_bytes // dtype.itemsize, ends, index)


def _kind_in(metadata: Path) -> np.dtype:
    first_line = metadata.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0]
    size = first_line.rpartition("|")[2]
    if not size.isdigit() or int(size) not in KINDS:
        raise UserError(f"{metadata} should begin with 'tokenizer|2' or 'tokenizer|4' and begins with {first_line!r}.")
    return KINDS[int(size)]
