"""A tiny run and the tiny tokenizer and shards it needs, made with the product's own tools in seconds."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "model": {
        "family": "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "data": {"seq_len": 32, "global_batch_size": 8, "micro_batch_size": 2},
    "steps": 8,
    "optim": {"lr": 5e-3, "schedule": {"name": "cosine", "warmup_steps": 2}},
    "methods": [
        {"name": "lir", "initializer_range": 0.02},
        {"name": "tvr", "target_std": 0.01, "interval_steps": 3, "ratio_threshold": 1.1},
    ],
    "deepspeed": "ds_configs/zero3_fp32.json",
    "checkpoint": {"interval_steps": 4},
    "eval": {"interval_steps": 4, "batches": 2},
    "log": {"interval_steps": 1, "weights_interval_steps": 3, "activations_interval_steps": 4},
    "resilience": {"agreement_interval_steps": 1},
}


@dataclass(frozen=True)
class Corpus:
    """A tokenizer folder, and the folders of training and validation shards made with it."""

    tokenizer: Path
    train: Path
    val: Path


def documents_of(count: int) -> list[str]:
    """Return English-looking texts without any randomness: words of a fixed list in an order that does not repeat soon."""
    words = ["weight", "variance", "layer", "token", "shard", "step", "rank", "the", "of", "holds", "keeps", "a"]
    return [
        " ".join(words[(i * i + 3 * i * j + j * j) % len(words)] for j in range(40 + i % 17)) + f" {i}."
        for i in range(count)
    ]


def make_corpus(folder: Path, documents: list[str], vocab_size: int = 320) -> Corpus:
    """Train a tokenizer of `vocab_size` on `documents` and write them as shards of about 4,000 tokens."""
    from pretrain.data.bpe import train_bpe
    from pretrain.data.prepare import prepare
    from pretrain.data.text.sources import open_source
    from pretrain.data.tokenizer import load_tokenizer, load_tokenizer_info

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_bpe([*documents, string.printable], vocab_size))
    load_tokenizer(folder / "tokenizer.model").save_pretrained(folder / "tokenizer")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    source = open_source([str(folder / "text.jsonl")], text_field="text", subset=None, split="train")
    info = load_tokenizer_info(folder / "tokenizer")
    prepare(source, info, folder / "shards", val_fraction=0.15, shard_tokens=4000, workers=1)
    return Corpus(folder / "tokenizer", folder / "shards/train", folder / "shards/val")


def tiny(corpus: Corpus) -> dict[str, Any]:
    """Return the content of `run_file`."""
    data = {"train": str(corpus.train), "val": str(corpus.val), **TINY["data"]}
    return {**TINY, "tokenizer": str(corpus.tokenizer), "data": data}
