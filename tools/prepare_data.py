"""Turn text into token shards for training and validation.

    python tools/prepare_data.py --source stdlib --tokenizer data/tokenizer --out data/demo
    python tools/prepare_data.py --source 'corpus/*.jsonl.zst' --tokenizer data/tokenizer --out data/corpus
    python tools/prepare_data.py --source hf://HuggingFaceFW/fineweb --subset sample-10BT --tokenizer ... --out ...

Run the same command again after an interruption: it goes on where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from pretrain import cli
from pretrain.data.prepare import prepare
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import load_tokenizer
from pretrain.errors import UserError


def main() -> None:
    options = _parse()
    shards = prepare(
        open_source(options.source, text_field=options.text_field, subset=options.subset, split=options.split),
        load_tokenizer(options.tokenizer),
        options.out,
        val_fraction=options.val_fraction,
        shard_tokens=options.shard_tokens,
        max_tokens=options.max_tokens,
        workers=options.workers,
    )
    print(f"complete: {options.out}")
    for split, held in shards.items():
        bytes_per_token = held.text_bytes / max(held.tokens, 1)
        print(
            f"  {split:5} {held.tokens:>15,} tokens {held.documents:>12,} documents {len(held.shards):>6} shards "
            f"{bytes_per_token:.2f} bytes of text per token"
        )
    if "val" in shards and not shards["val"].tokens:
        print("  No document fell into val: raise --val-fraction, or give more documents, to have validation data.")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_source_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder or SentencePiece .model file")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for train/ and val/; new, empty, or to go on in"
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents for val (default: 0.01)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens per shard (default: 100000000)")
    parser.add_argument("--max-tokens", type=int, help="stop after the document that reaches this many training tokens")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenise; they do not change the result (default: the CPU cores)",
    )
    options = parser.parse_args()
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction} is not a share: give 0 or more and less than 1.")
    for name in ("shard_tokens", "max_tokens", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is too small: give at least 1.")
    return options


if __name__ == "__main__":
    cli.run(main)
