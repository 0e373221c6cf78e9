"""The .bin files of llm.c and modded-nanogpt: 256 int32 of header, then raw tokens.

The header is a magic number, a version and the number of tokens, and zeros. Magic 20240520 with version 1 stands for uint16
tokens, 20240801 with version 7 for uint32 ones (Llama 3's vocabulary). Nothing says where documents end: they begin with
the separator in the files that llm.c and modded-nanogpt prepare. So a file begins with a document of one separator here,
and each further document has the separator of the next one at its end, as our own documents have theirs.

Sources: llm.c, dev/data/data_common.py; modded-nanogpt, data/fineweb.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.tokens.external_files import TokenFile, TokenFormat
from pretrain.errors import UserError

HEADER_BYTES = 1024
KINDS: dict[tuple[int, int], np.dtype] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}


def recognizes(location: Path) -> bool:
    """Return whether the file, or the first .bin file of the folder, begins with one of the magic numbers."""
    first = next(iter(_paths(location)), location)
    return first.is_file() and any(magic in _header(first)[:1] for magic, _ in KINDS)


def token_files(location: Path) -> list[TokenFile]:
    """Return the .bin file at `location`, or all in that folder by name; UserError for one that is damaged or none."""
    return [_token_file(path) for path in _paths(location)]


class LlmcWriter:
    """Writes folder/NAME.bin. The header is written last, because it holds the number of tokens."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype, documents: int, empty: int) -> None:
        self.dtype, self._tokens = dtype, 0
        self._file = open(folder / f"{name}.bin", "wb")  # noqa: SIM115 - closed by close()
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        self._file.write(tokens.data)
        self._tokens += len(tokens)

    def close(self) -> None:
        magic, version = next(kind for kind, dtype in KINDS.items() if dtype == self.dtype)
        if self._tokens > np.iinfo(np.int32).max:
            raise UserError(f"{self._tokens:,} tokens do not fit in the header of one llm.c file, which is int32.")
        self._file.seek(0)
        self._file.write(np.array([magic, version, self._tokens], "<i4").tobytes())
        self._file.close()


LLMC = TokenFormat(
    name="llmc",
    read=lambda location, _: token_files(location),
    writer=LlmcWriter,
    recognizes=recognizes,
)


def _paths(location: Path) -> list[Path]:
    return sorted(location.glob("*.bin")) if location.is_dir() else [location]


def _header(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    return np.frombuffer(head[: len(head) // 4 * 4], "<i4")


def _token_file(path: Path) -> TokenFile:
    if not path.is_file():
        raise UserError(f"'{path}' is not a file. Name one of llm.c's .bin files, or a folder of them.")
    header = _header(path)
    if len(header) < HEADER_BYTES // 4:
        raise UserError(f"{path} has {path.stat().st_size} bytes, less than llm.c's header of {HEADER_BYTES}.")
    dtype = KINDS.get((int(header[0]), int(header[1])))
    if dtype is None:
        known = " or ".join(f"{magic} and {version} ({dtype.name})" for (magic, version), dtype in KINDS.items())
        raise UserError(
            f"{path} begins with the numbers {header[0]} and {header[1]}, and llm.c's files of tokens with {known}. It is "
            "not one of them."
        )
    if header[3:].any():
        raise UserError(
            f"{path} has more in its header than llm.c writes (number {3 + int(np.argmax(header[3:] != 0))})."
        )
    tokens, found = int(header[2]), path.stat().st_size
    if found != (expected := HEADER_BYTES + tokens * dtype.itemsize):
        raise UserError(
            f"{path} has {found} bytes, and the {tokens} {dtype.name} tokens of its header take {expected}. It was cut or "
            "changed: restore it."
        )
    return TokenFile(path, dtype, tokens, offset=HEADER_BYTES)
