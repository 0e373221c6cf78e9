"""A tokenizer of random words and a corpus of random tokens: nothing is downloaded, and every id of the vocabulary occurs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pretrain.data import fingerprint, load_tokenizer
from pretrain.data.tokens.writer import ShardWriter, token_dtype

_END = "</s>"
_MEAN_DOCUMENT = 600  # tokens


@dataclass(frozen=True)
class Material:
    """A tokenizer folder, and the folder of token shards made with it."""

    tokenizer: Path
    shards: Path

    @property
    def settings(self) -> dict[str, str | None]:
        """The keys of a run file that name them, with dots."""
        return {"tokenizer": str(self.tokenizer), "data.train": str(self.shards), "data.val": None}


def make_material(folder: Path, vocabulary: int, tokens: int) -> Material:
    """Write a tokenizer of `vocabulary` words and about `tokens` random tokens in documents of random lengths."""
    tokenizer_folder, shards = folder / "tokenizer", folder / "shards"
    _write_tokenizer(tokenizer_folder, vocabulary)
    tokenizer = load_tokenizer(tokenizer_folder)
    generator = np.random.default_rng(0)
    ends = np.cumsum(generator.integers(2, 2 * _MEAN_DOCUMENT, size=max(4, tokens // _MEAN_DOCUMENT)))
    ids = generator.integers(0, vocabulary, size=int(ends[-1])).astype(token_dtype(vocabulary))
    end_id = tokenizer.eos_token_id
    ids[ends - 1] = end_id
    writer = ShardWriter(shards, token_dtype(vocabulary), shard_tokens=len(ids))
    writer.append(ids, ends)
    writer.finish(
        {
            "text_bytes": len(ids),
            "vocab_size": vocabulary,
            "eos_id": end_id,
            "bos_id": None,
            "tokenizer_fingerprint": fingerprint(tokenizer),
        }
    )
    return Material(tokenizer_folder, shards)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {_END: 0, "<unk>": 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, unk_token="<unk>").save_pretrained(str(folder))
