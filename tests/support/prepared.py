"""Helpers for tests of preparations: prepare with small defaults, stop like a kill, and read the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from pretrain.data import TokenShards
from pretrain.data.prepare import preparation, prepare
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import TokenizerInfo

OPTIONS: dict[str, Any] = {"val_fraction": 0.2, "held_out_fraction": 0.1, "shard_tokens": 3000, "workers": 1}


class Stopped(Exception):
    """A stand-in for a kill between two units of work."""


def prepare_files(
    spec: str, tokenizer: TokenizerInfo, out: Path, part: tuple[int, int] | None = None, **options: Any
) -> dict[str, TokenShards]:
    """Call `prepare` on the files of `spec`, with OPTIONS where `options` give no value."""
    source = open_source([spec], text_field="text", subset=None, split="train", part=part)
    return prepare(source, tokenizer, out, part=part, **(OPTIONS | options))


def stop_after(monkeypatch: pytest.MonkeyPatch, units: int) -> None:
    """Let the next preparation end with `Stopped` after that many units of work. Those after it run as usual."""
    whole = preparation.encode_in_order

    def some(*arguments: Any) -> Iterator[Any]:
        monkeypatch.setattr(preparation, "encode_in_order", whole)
        encoded = whole(*arguments)
        for _ in range(units):
            yield next(encoded)
        raise Stopped

    monkeypatch.setattr(preparation, "encode_in_order", some)


def contents(out: Path) -> dict[str, bytes]:
    """Return the content of every file of every split of `out`, manifests included."""
    splits = [out / split for split in ("train", "val", "held_out")]
    return {str(file.relative_to(out)): file.read_bytes() for split in splits for file in sorted(split.glob("*"))}


def documents_of(folder: Path) -> list[bytes]:
    """Return the tokens of each document in a shard folder, in order, by numpy and the manifest alone."""
    manifest = manifest_of(folder)
    documents = []
    for shard in manifest["shards"]:
        tokens = np.fromfile(folder / shard["file"], dtype=manifest["dtype"])
        ends = np.fromfile(folder / shard["ends_file"], dtype="<u8").astype(int)
        assert (tokens[ends - 1] == manifest["eos_id"]).all()
        assert (tokens == manifest["eos_id"]).sum() == len(ends)
        documents += [part.tobytes() for part in np.split(tokens, ends[:-1])]
    return documents


def texts_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the texts in a shard folder, decoded."""
    dtype = manifest_of(folder)["dtype"]
    return [str(tokenizer.decode(np.frombuffer(document, dtype)[:-1])) for document in documents_of(folder)]


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())
