"""Train a SentencePiece BPE and export it as a tokenizer folder that `transformers.AutoTokenizer` loads.

    python tools/train_tokenizer.py --source stdlib --vocab-size 8192 --out data/tokenizer
    python tools/train_tokenizer.py --source 'corpus/*.jsonl' --vocab-size 65536 --max-bytes 1e9 --out data/tokenizer

It learns from the first --max-bytes of text of the source. The same text gives the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this package, whatever else is called so
from pretrain import startup

startup.begin()

import argparse
import os
import tempfile
from collections.abc import Iterator

from pretrain import cli, typed
from pretrain.data.bpe import tokenizer_from_sentencepiece, train_bpe
from pretrain.data.contents import read_json
from pretrain.data.text.sources import Source, open_source
from pretrain.errors import UserError
from pretrain.files import require_utf8, write_json

RECORD = "training.json"


def main() -> None:
    options = _parse()
    require_utf8(options.out, "--out")
    source = open_source(
        options.source,
        text_field=options.text_field,
        subset=options.subset,
        split=options.split,
        filters=options.filters,
    )
    settings = {"source": source.description, "vocab_size": options.vocab_size, "max_bytes": options.max_bytes}
    if _is_made(options.out, settings):
        print(f"complete already: {options.out}")
        return
    model = train_bpe(_sample(source, settings["max_bytes"]), options.vocab_size)
    _export(model, settings, options.out)
    print(f"complete: {options.out} ({options.vocab_size} tokens)")


def _is_made(out: Path, settings: dict) -> bool:
    """Whether `out` holds the result of this very command; UserError when it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / RECORD).is_file() and read_json(out / RECORD) == settings:
        return True
    raise UserError(
        f"'{out}' exists and was not made by this very command, so it is left as it is. Give --out another folder."
    )


def _sample(source: Source, max_bytes: int) -> Iterator[str]:
    """Texts from the start of the source until they add up to `max_bytes` of UTF-8."""
    taken = 0
    for text in source.texts():
        content = text.encode("utf-8", "replace")
        yield content.decode()
        taken += len(content)
        if taken >= max_bytes:
            return


def _export(model: bytes, settings: dict, out: Path) -> None:
    """Write the folder beside `out`, then rename it, so that `out` is complete or as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
            folder = Path(aside) / "tokenizer"
            folder.mkdir()
            (folder / "tokenizer.model").write_bytes(model)
            tokenizer_from_sentencepiece(folder / "tokenizer.model").save_pretrained(folder)
            write_json(folder / RECORD, settings)
            os.replace(folder, out)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenizer to '{out}': {error}. Make room or mend the permissions."
        ) from error


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_source_arguments(parser)
    parser.add_argument("--vocab-size", type=typed.whole(1), default=8192, help="number of tokens (default: 8192)")
    parser.add_argument(
        "--max-bytes", type=typed.whole(1), default=50_000_000, help="text to learn from, in bytes (default: 50e6)"
    )
    parser.add_argument("--out", type=typed.path, required=True, help="folder to make")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
