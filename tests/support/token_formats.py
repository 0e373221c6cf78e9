"""Other trainers' token files, written out from their published layouts, without our code."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

MEGATRON_CODES = {"uint16": 8, "int32": 4}


def documents(seed: int, vocab_size: int, lengths: list[int], separator: int = 0) -> list[np.ndarray]:
    """Return random documents of these lengths, each closed by the separator unless it is empty."""
    random = np.random.default_rng(seed)
    return [np.append(random.integers(1, vocab_size, max(0, length - 1)), separator)[:length] for length in lengths]


def write_megatron(
    prefix: Path, documents: list[np.ndarray], dtype: str, sequences: list[list[int]] | None = None
) -> None:
    """Write PREFIX.bin and .idx. sequences: the lengths of each document's sequences; by default one if it has tokens."""
    sequences = sequences or [[len(document)] if len(document) else [] for document in documents]
    lengths = [length for document in sequences for length in document]
    pointers = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    marks = np.cumsum([0, *(len(document) for document in sequences)])
    prefix.with_name(prefix.name + ".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    prefix.with_name(prefix.name + ".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, MEGATRON_CODES[dtype], len(lengths), len(marks))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(marks)}q", *marks)
    )


def write_datatrove(path: Path, documents: list[np.ndarray], size: int, metadata: bool = True) -> None:
    """Write PATH (.ds) with its index and metadata."""
    ends = np.cumsum([len(document) for document in documents]).tolist()
    tokens = np.concatenate([np.empty(0, int), *documents]).tolist()
    path.write_bytes(struct.pack(f"<{len(tokens)}{'H' if size == 2 else 'I'}", *tokens))
    Path(f"{path}.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    if metadata:
        Path(f"{path}.metadata").write_text(f"gpt2|{size}\n{len(tokens)}\n{len(tokens)} T", encoding="utf-8")
