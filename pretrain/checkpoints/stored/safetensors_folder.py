"""The weights in a folder of safetensors files, found without reading any.

A file begins with the length of its header, 8 bytes, and the header: JSON with dtype, shape and place of each tensor. The
format (https://github.com/huggingface/safetensors#format) holds no code. Several files have an index that says which holds
which tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoints.stored.files import Span
from pretrain.checkpoints.stored.tensor import Part, StoredTensor
from pretrain.data.json_files import parse_json, read_json
from pretrain.errors import UserError
from pretrain.files import patiently
from pretrain.sharded.piece import Slice

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


def safetensors_weights(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor in the safetensors files of a Hugging Face folder, by its name.

    Raises:
        UserError: there are none, a file is damaged, or a tensor is of another dtype than float32, bfloat16 and float16.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / ONE_FILE).is_file():
        return tensors_of_file(folder / ONE_FILE)
    pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    because = (
        f"It holds {pickled[0]}, which may run code when it is read. Load it where you trust it, and save it again with "
        "`save_pretrained`, which writes safetensors."
        if pickled
        else "Name a folder as `save_pretrained` and tools/convert_to_hf.py write it."
    )
    raise UserError(f"{folder} holds neither {ONE_FILE} nor {INDEX}. {because}")


def tensors_of_file(path: Path) -> dict[str, StoredTensor]:
    """Return every tensor in one safetensors file, by its name. UserError if the file is damaged."""
    entries, begin, size = _header(path)
    found = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            kind, shape, (first, last) = entry["dtype"], tuple(map(int, entry["shape"])), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not say where {name} lies: it is damaged.") from error
        if kind not in _DTYPES:
            raise UserError(
                f"{path} holds {name} as {kind}; weights are read as {', '.join(_DTYPES)}. Save the model again in one of them."
            )
        if last - first != prod(shape) * _DTYPES[kind].itemsize or not 0 <= first <= last <= size - begin:
            raise UserError(f"{path} ends before {name}, or gives it a wrong place: it is not whole. Copy it again.")
        span = Span(path, begin + first, prod(shape), _DTYPES[kind])
        found[name] = StoredTensor(shape, (Part(Slice(shape), 0, span),))
    return found


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, Mapping) or any(Path(str(name)).name != name for name in places.values()):
        raise UserError(f"{folder / INDEX} does not say which file of {folder} holds which weight: it is damaged.")
    found = {file: tensors_of_file(folder / file) for file in sorted(set(places.values()))}
    if lost := [name for name, file in places.items() if name not in found[file]]:
        raise UserError(
            f"{folder / places[lost[0]]} does not hold {lost[0]}, which {INDEX} says it does. Copy it again."
        )
    return {name: found[file][name] for name, file in places.items()}


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return a file's header, the byte after it, and the file's size."""

    def read() -> tuple[int, bytes, int]:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return length, file.read(min(length, _LONGEST_HEADER)), path.stat().st_size

    try:
        length, text, size = patiently(read, f"reading {path}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if size < 8 or len(text) != length:
        raise UserError(f"{path} is not a whole safetensors file: it ends within its header. Copy it again.")
    return parse_json(text, str(path)), 8 + length, size
