"""Raw tokens without an index: nanoGPT's .bin (uint16) and OLMo-core's .npy (no NumPy header, despite the name).

Nothing in such a file says what kind of number it holds, which tokenizer made it or where documents end, so it is
imported with a tokenizer, whose separator ends documents. OLMo's documents are in NAME.csv.gz where that is there:
a line for each, its first token and the one after its last, and more that is not read.
"""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from pretrain.data.tokens import llmc
from pretrain.data.tokens.external_files import IndexedFile, ListedEnds, TokenFile, TokenFormat, check_boundaries
from pretrain.errors import UserError

_LOOKED_AT = 1 << 16


def nanogpt_files(path: Path) -> list[TokenFile]:
    """Return the file at `path` as a list of one; UserError when it is none."""
    if not path.is_file():
        raise UserError(f"'{path}' is not a file. Name one of nanoGPT's .bin files.")
    return [_token_file(path, np.dtype("<u2"))]


def olmo_files(path: Path, dtype: np.dtype) -> list[TokenFile]:
    """Return the .npy file at `path`, or all in that folder by name, as tokens of `dtype`; UserError for none."""
    paths = [path] if path.is_file() else _npy_paths(path)
    if not paths:
        raise UserError(f"there are no .npy files at '{path}'.")
    return [_token_file(path, dtype, _listed_documents(path)) for path in paths]


def _npy_paths(location: Path) -> list[Path]:
    return sorted(location.glob("*.npy")) if location.is_dir() else [location] * (location.suffix == ".npy")


class RawWriter:
    """Writes tokens and nothing else to folder/NAME plus the suffix of the format."""

    suffix: str

    def __init__(self, folder: Path, name: str, dtype: np.dtype, documents: int, empty: int) -> None:
        self.dtype = dtype
        self._file = open(folder / f"{name}{self.suffix}", "wb")  # noqa: SIM115 - closed by close()

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self._file.write(tokens.data)

    def close(self) -> None:
        self._file.close()


class NanoGPTWriter(RawWriter):
    suffix = ".bin"


class OlmoWriter(RawWriter):
    suffix = ".npy"


NANOGPT = TokenFormat(
    name="nanogpt",
    read=lambda location, _: nanogpt_files(location),
    writer=NanoGPTWriter,
    dtype_for=lambda _: np.dtype("<u2"),
    one_file=True,
    recognizes=lambda location: location.suffix == ".bin" and location.is_file() and not llmc.recognizes(location),
)
OLMO = TokenFormat(
    name="olmo", read=olmo_files, writer=OlmoWriter, recognizes=lambda location: bool(_npy_paths(location))
)


def _token_file(path: Path, dtype: np.dtype, documents: tuple[Path, np.ndarray] | None = None) -> TokenFile:
    size_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(_LOOKED_AT)
    if head.startswith(b"\x93NUMPY"):
        raise UserError(f"{path} has a NumPy header, and OLMo-core's .npy files are raw tokens: it is not one of them.")
    if size_bytes == 0 or size_bytes % dtype.itemsize:
        raise UserError(f"{path} has {size_bytes} bytes, which are not a whole number of {dtype.name} tokens, or none.")
    pairs = np.frombuffer(head[: len(head) // 4 * 4], "<u2").reshape(-1, 2)
    if dtype.itemsize == 2 and len(pairs) and not pairs[:, 1].any() and pairs[:, 0].any():
        raise UserError(f"every second number of {path} is 0, so its tokens are uint32, not uint16. Say so (dtype).")
    tokens = size_bytes // dtype.itemsize
    if documents is None:
        return TokenFile(path, dtype, tokens)
    index, ends = documents
    check_boundaries(index, ListedEnds(ends), tokens)
    return IndexedFile(path, dtype, tokens, ListedEnds(ends), index)


def _listed_documents(path: Path) -> tuple[Path, np.ndarray] | None:
    """Return the .csv.gz beside an OLMo file and the document ends in it, int64; None when there is none."""
    listing = path.with_suffix(".csv.gz")
    if not listing.exists():
        return None
    try:
        with gzip.open(listing, "rt", encoding="utf-8", newline="") as file:
            spans = np.array([(int(row[0]), int(row[1])) for row in csv.reader(file)], np.int64).reshape(-1, 2)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {listing}: {error}. Restore it, or remove it to use separators.") from error
    gaps = spans[:, 0] != np.concatenate([[0], spans[:-1, 1]])
    if gaps.any():
        raise UserError(
            f"line {int(np.argmax(gaps)) + 1} of {listing} leaves a gap between documents. Restore it, or remove it "
            "to use separators."
        )
    return listing, spans[:, 1]
