"""A reader of wandb's offline files, which says what rows they hold. A killed process has not flushed all of its rows.

A `.wandb` file is a log of protocol buffers in LevelDB's format, after a header of 7 bytes. Blocks of 32 KiB hold records
of a checksum (4 bytes), a length (2), a type (1: whole, 2: first, 3: middle, 4: last part) and content.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_HEADER, _BLOCK = struct.Struct("<IHB"), 1 << 15
_FILE_HEADER = b":W&B"


def steps_in_files(folder: Path, run_id: str) -> int:
    """Return one more than wandb's last step in the offline files of the run `run_id`, 0 if there are none.

    Args:
        folder: the run folder.
    """
    files = folder.glob(f"wandb/offline-run-*-{run_id}/*.wandb")
    return max((step + 1 for file in files for step in history_steps(file)), default=0)


def history_steps(path: Path) -> Iterator[int]:
    """Yield wandb's step of each row in a `.wandb` file, as far as the file is whole."""
    for row in history(path):
        yield int(row["_step"])


def history(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows that were logged into a `.wandb` file, as far as it is whole."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # chosen by protobuf's version

    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        if record.HasField("history"):
            items = ((item.key or ".".join(item.nested_key), item.value_json) for item in record.history.item)
            row = {key: json.loads(value) for key, value in items}
            yield {"_step": record.history.step.num, **row}


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the content of each whole record."""
    if not data.startswith(_FILE_HEADER):
        return
    at, parts = 7, []
    while at + _HEADER.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:
            at += left
            continue
        _, length, kind = _HEADER.unpack_from(data, at)
        content = data[at + _HEADER.size : at + _HEADER.size + length]
        if kind not in (1, 2, 3, 4) or len(content) < length:
            return
        at += _HEADER.size + length
        parts.append(content)
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
