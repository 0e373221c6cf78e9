"""Train a SentencePiece BPE and export it as a tokenizer folder that `transformers.AutoTokenizer` loads.

    python tools/train_tokenizer.py --source stdlib --vocab-size 8192 --out data/tokenizer
    python tools/train_tokenizer.py --source 'corpus/*.jsonl' --vocab-size 65536 --max-bytes 1e9 --out data/tokenizer

It learns from the first --max-bytes of text of the source. The same text gives the same files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from pretrain.cli import argument_types, command
from pretrain.cli.parser import tool_parser
from pretrain.data.bpe import tokenizer_from_sentencepiece, train_bpe
from pretrain.data.json_files import read_json
from pretrain.data.text import Source
from pretrain.data.text.blocks import texts_of
from pretrain.data.text.faults import Fault, Tally, advice_on
from pretrain.data.text.omissions import Omissions, in_words
from pretrain.data.tokenizer_files import portable_files, write_files
from pretrain.errors import UserError
from pretrain.files import require_utf8, unfinished, write_json

RECORD = "training.json"


def main() -> None:
    options = _parse()
    require_utf8(options.out, "--out")
    source = command.open_source_of(options)
    settings = {"source": source.description, "vocab_size": options.vocab_size, "max_bytes": options.max_bytes}
    if _is_made(options.out, settings):
        print(f"complete already: {options.out}")
        return
    omissions = Omissions(source.files, options.max_bad_records)
    try:
        texts = _sample(source, options.max_bytes, omissions, options.skip_unreadable)
        model = train_bpe(texts, options.vocab_size)
    except Fault as error:
        raise advice_on(error, omissions.good + error.before) from error
    _export(model, settings, options.out)
    if gone := in_words(omissions.sums):
        print(gone)
    print(f"complete: {options.out} ({options.vocab_size} tokens)")


def _is_made(out: Path, settings: dict) -> bool:
    """Return whether `out` holds the result of this very command. Raise UserError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / RECORD).is_file() and read_json(out / RECORD) == settings:
        return True
    raise UserError(
        f"'{out}' exists and was not made by this very command, so it is left as it is. Give --out another folder."
    )


def _sample(source: Source, max_bytes: int, omissions: Omissions, skip_unreadable: bool) -> Iterator[str]:
    """Yield texts from the start of the source until they add up to `max_bytes` of UTF-8."""
    print(source.listing, file=sys.stderr, flush=True)
    taken = 0
    for block in source.blocks():
        tally = Tally()
        for text in texts_of(block, tally, skip_unreadable):
            content = text.encode("utf-8", "replace")
            yield content.decode()
            taken += len(content)
            if taken >= max_bytes:
                break
        omissions.add(tally)
        if taken >= max_bytes:
            source.check_unchanged()
            break
    omissions.close()


def _export(model: bytes, settings: dict, out: Path) -> None:
    """Write the folder beside `out`, then rename it, so that `out` is either complete or untouched."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(out.with_name(f".{out.name}.{os.getpid()}.tmp")) as folder:
            folder.mkdir()
            (folder / "tokenizer.model").write_bytes(model)
            tokenizer = tokenizer_from_sentencepiece(folder / "tokenizer.model")
            write_files(portable_files(tokenizer, folder), folder)
            write_json(folder / RECORD, settings)
            os.replace(folder, out)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenizer to '{out}': {error}. Free disk space or correct the permissions."
        ) from error


def _parse() -> argparse.Namespace:
    parser = tool_parser(__doc__)
    command.add_source_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=argument_types.whole(1), default=8192, help="number of tokens (default: 8192)"
    )
    parser.add_argument(
        "--max-bytes",
        type=argument_types.whole(1),
        default=50_000_000,
        help="text to learn from, in bytes (default: 50e6)",
    )
    parser.add_argument("--out", type=argument_types.path, required=True, help="folder to make")
    return parser.parse_args()
