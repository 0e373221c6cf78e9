"""Write safetensors files one tensor at a time, so that memory holds one tensor for any size of file.

The format (https://github.com/huggingface/safetensors#format) puts every tensor's place before the first byte of data.
So the shapes are given, and each tensor must have the shape that was given for it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pretrain.errors import UserError
from pretrain.files import write_json
from pretrain.model.export_edits import LazyTensors

SHARD_BYTES = 4 << 30
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Shapes = Mapping[str, tuple[int, ...]]


def write_weights(folder: Path, tensors: LazyTensors, shapes: Shapes, dtype: torch.dtype) -> int:
    """Write tensors to model-0000I-of-0000N.safetensors and their index.

    Each is loaded, cast, written and dropped in the order of `shapes`.

    Args:
        folder: Where the files go.
        tensors: A function for each name that loads the tensor.
        shapes: The shape of each tensor, by name.
        dtype: The stored dtype: float32, bfloat16 or float16.

    Returns:
        N, the number of files of weights.

    Raises:
        ValueError: If a tensor has another shape.
        UserError: If a value is too large for `dtype`.
    """
    shards = _share_out(shapes, dtype.itemsize)
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    with tqdm(total=_bytes(shapes, dtype.itemsize), unit="B", unit_scale=True, desc="writing", disable=None) as bar:
        for file, shard in zip(files, shards, strict=True):
            _write_shard(folder / file, tensors, shard, dtype, bar)
    write_json(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": _bytes(shapes, dtype.itemsize)},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        },
    )
    return len(shards)


def _share_out(shapes: Shapes, item_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """Return consecutive tensors for each file, up to SHARD_BYTES; a larger tensor has a file for itself."""
    shards: list[dict[str, tuple[int, ...]]] = []
    free_bytes = 0
    for name, shape in shapes.items():
        size = prod(shape) * item_bytes
        if size > free_bytes or not shards:
            shards.append({})
            free_bytes = SHARD_BYTES
        shards[-1][name] = shape
        free_bytes -= size
    return shards


def _write_shard(path: Path, tensors: LazyTensors, shapes: Shapes, dtype: torch.dtype, bar: tqdm) -> None:
    with open(path, "wb") as file:
        file.write(_header(shapes, dtype))
        for name, shape in shapes.items():
            bar.update(file.write(_content(name, tensors[name](), shape, dtype).data))
        file.flush()
        os.fsync(file.fileno())


def _content(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
    """Return the tensor's bytes in `dtype`. A separate function, so that no name keeps it alive while the next is loaded."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(tensor.shape)} where the architecture has {shape}")
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        raise UserError(
            f"{name} holds values up to {float(tensor.abs().max()):.6g}, and {dtype} ends at {torch.finfo(dtype).max:.6g}. "
            "Convert to another --dtype."
        )
    return cast.contiguous().view(-1).view(torch.uint8).numpy()


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(shapes: Shapes, item_bytes: int) -> int:
    return sum(map(prod, shapes.values())) * item_bytes
