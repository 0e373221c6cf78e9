"""Other trainers' token files, written out from their published layouts, without our code."""

from __future__ import annotations

import json
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


def write_llmc(path: Path, documents: list[np.ndarray], dtype: str) -> None:
    """Write PATH (.bin) with the header of 256 int32."""
    tokens = np.concatenate(documents).astype(dtype)
    kind = {"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype]
    path.write_bytes(struct.pack("<3i", *kind, len(tokens)) + bytes(1012) + tokens.tobytes())


def write_mds(folder: Path, files: list[list[np.ndarray]], dtype: str, fixed: bool = False) -> None:
    """Write index.json and a file of samples for each list, with a column of text before the tokens.

    Args:
        fixed: all samples have one length, which the index states instead of each sample.
    """
    folder.mkdir()
    shards = []
    for number, samples in enumerate(files):
        encoded = []
        for place, tokens in enumerate(samples):
            text, body = b"text %d" % place, tokens.astype(dtype).tobytes()
            if not fixed:
                body = struct.pack("<BI", (1 << 2) | 2, len(tokens)) + body
            sizes = [len(text)] if fixed else [len(text), len(body)]
            encoded.append(struct.pack(f"<{len(sizes)}I", *sizes) + text + body)
        config = b'{"a": "comment"}'
        starts = 4 + 4 * (len(encoded) + 1) + len(config) + np.cumsum([0, *map(len, encoded)])
        content = struct.pack(f"<{1 + len(starts)}I", len(encoded), *starts) + config + b"".join(encoded)
        (folder / f"shard.{number:05d}.mds").write_bytes(content)
        encoding = f"ndarray:{dtype}" + (f":{len(samples[0])}" if fixed else "")
        shards.append(
            {
                "column_encodings": ["str", encoding],
                "column_names": ["text", "tokens"],
                "column_sizes": [None, samples[0].astype(dtype).nbytes if fixed else None],
                "compression": None,
                "format": "mds",
                "hashes": [],
                "raw_data": {"basename": f"shard.{number:05d}.mds", "bytes": len(content), "hashes": {}},
                "samples": len(encoded),
                "size_limit": 1 << 26,
                "version": 2,
                "zip_data": None,
            }
        )
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": shards}), encoding="utf-8")


def write_litdata(folder: Path, files: list[list[np.ndarray]], dtype: str, data_format: str) -> None:
    """Write index.json and a file of samples for each list. data_format: litdata's name of `dtype`."""
    folder.mkdir()
    chunks = []
    for number, samples in enumerate(files):
        encoded = [tokens.astype(dtype).tobytes() for tokens in samples]
        starts = 4 + 4 * (len(encoded) + 1) + np.cumsum([0, *map(len, encoded)])
        content = struct.pack(f"<{1 + len(starts)}I", len(encoded), *starts) + b"".join(encoded)
        (folder / f"chunk-0-{number}.bin").write_bytes(content)
        sizes = {"chunk_bytes": len(content), "chunk_size": len(encoded), "dim": sum(map(len, samples))}
        chunks.append({"filename": f"chunk-0-{number}.bin", **sizes})
    config = {"compression": None, "data_format": [data_format], "encryption": None}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}), encoding="utf-8")
