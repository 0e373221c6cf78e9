"""A small real tokenizer and small real shards for the tests of the data path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from pretrain.data import TokenShards, load_tokenizer, open_shards
from pretrain.data.bpe import train_bpe
from pretrain.data.text.sources import open_source
from pretrain.data.tokens import ShardWriter

# Machines that run tests are shared, so how long an example takes says nothing.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def library_texts() -> list[str]:
    """Every 20th text of the standard library: real code and prose, about half a megabyte."""
    return list(open_source(["stdlib"], text_field="text", subset=None, split="train").texts())[::20]


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory, library_texts: list[str]) -> Path:
    """A SentencePiece model of 1,000 tokens, trained on half of the library texts."""
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(train_bpe(library_texts[::2], 1000))
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    load_tokenizer(model_file).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path):
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., TokenShards]:
    """make_shards(tokens, ...) -> the shards, opened, in tmp_path/folder; token i is `first` + i."""

    def make(
        tokens: int,
        shard_tokens: int = 1000,
        document_tokens: int = 7,
        dtype: str = "<u2",
        first: int = 0,
        folder: str = "shards",
    ) -> TokenShards:
        ends = np.array([*range(document_tokens, tokens, document_tokens), tokens])
        writer = ShardWriter(tmp_path / folder, np.dtype(dtype), shard_tokens)
        writer.append(np.arange(first, first + tokens).astype(dtype), ends)
        vocab_size = np.iinfo(dtype).max + 1
        writer.finish({"vocab_size": vocab_size, "eos_id": 2, "tokenizer_fingerprint": "abc", "text_bytes": 3 * tokens})
        return open_shards(tmp_path / folder)

    return make
