"""Turn text into token shards for training, validation and testing; join, import and export token files.

    python tools/prepare_data.py --source stdlib --tokenizer data/tokenizer --out data/demo
    python tools/prepare_data.py --source 'corpus/*.jsonl.zst' --tokenizer data/tokenizer --out data/corpus --shuffle 1
    python tools/prepare_data.py --source hf://HuggingFaceFW/fineweb --subset sample-10BT --tokenizer ... --out ...

The same in parts, on as many machines as there are (slurm/prepare_data.sbatch), and their union:

    python tools/prepare_data.py --source 'corpus/*.parquet' --tokenizer data/tokenizer --out data/corpus --part 0/16
    python tools/prepare_data.py --merge --out data/corpus

Token files of other trainers become shards, and shards become theirs, without loss:

    python tools/prepare_data.py --import megatron --source old/corpus_text --tokenizer data/tokenizer --out data/corpus
    python tools/prepare_data.py --export megatron --source data/corpus/train --out data/megatron

Run the same command again after an interruption: it continues where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable
from pathlib import Path

from pretrain.cli import argument_types, command
from pretrain.cli.parser import tool_parser
from pretrain.data.prepare import merge, prepare
from pretrain.data.text.omissions import in_words
from pretrain.data.tokenizer import load_tokenizer_info
from pretrain.data.tokens import TokenShards, open_shards
from pretrain.data.tokens.formats import EXPORTED, FORMATS
from pretrain.errors import UserError

# Which options each of these modes needs, and which it takes besides. Without a mode, text is prepared.
_NEEDS = {
    "merge": {"out"},
    "import": {"source", "tokenizer", "out"},
    "export": {"source", "out"},
}
_TAKES = {
    "merge": {"workers", "shuffle"},
    "import": {"shard_tokens", "dtype"},
    "export": set[str](),
}
_TEXT_NEEDS = {"source", "tokenizer", "out"}


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    _refuse_contradictions(options, parser)
    if options.merge:
        _summarise(options.out, merge(options.out, workers=options.workers, shuffle_seed=options.shuffle))
    elif getattr(options, "import"):
        _import(options)
    elif options.export:
        _export(options)
    else:
        _prepare(options)


def _prepare(options: argparse.Namespace) -> None:
    tokenizer = load_tokenizer_info(options.tokenizer)
    shards = prepare(
        command.open_source_of(options, part=options.part),
        tokenizer,
        options.out,
        val_fraction=options.val_fraction,
        held_out_fraction=options.held_out_fraction,
        shard_tokens=options.shard_tokens,
        max_tokens=options.max_tokens,
        workers=options.workers,
        shuffle_seed=options.shuffle,
        part=options.part,
        skip_unreadable=options.skip_unreadable,
        max_bad_share=options.max_bad_records,
        add_bos=options.add_bos,
    )
    _summarise(options.out, shards)


def _import(options: argparse.Namespace) -> None:
    from pretrain.data.tokens.import_export import import_tokens

    import_tokens(
        getattr(options, "import"),
        _only(options.source, "--import"),
        options.out,
        load_tokenizer_info(options.tokenizer),
        shard_tokens=options.shard_tokens,
        dtype=options.dtype,
    )
    print(f"complete: {options.out}")


def _export(options: argparse.Namespace) -> None:
    from pretrain.data.tokens.import_export import export_tokens

    export_tokens(options.export, open_shards(_only(options.source, "--export")), options.out)
    print(f"complete: {options.out}")


def _summarise(out: Path, shards: dict[str, TokenShards]) -> None:
    print(f"complete: {out}")
    for split, held in shards.items():
        bytes_per_token = (held.text_bytes or 0) / max(held.tokens, 1)
        print(
            f"  {split:8} {held.tokens:>15,} tokens {held.documents:>12,} documents {len(held.shards):>6} shards "
            f"{bytes_per_token:.2f} bytes of text per token"
        )
    manifest = shards["train"].manifest
    if gone := in_words(manifest.get("left_out", {})):
        where = " (named in the manifests, under `unreadable`)" if manifest.get("unreadable") else ""
        print(f"  {gone}{where}")
    for split in shards.keys() - {"train"}:
        if not shards[split].tokens:
            option = f"--{split.replace('_', '-')}-fraction"
            print(f"  No document fell into {split}: raise {option}, or give more documents, to have such data.")


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    command.add_source_arguments(parser, required=False)
    parser.add_argument("--tokenizer", type=argument_types.path, help="tokenizer folder or SentencePiece .model file")
    parser.add_argument(
        "--out", type=argument_types.path, help="folder for train/ and so on; new, empty, or to go on in"
    )
    parser.add_argument("--val-fraction", type=float, default=0.01, help="share of documents for val (default: 0.01)")
    parser.add_argument(
        "--held-out-fraction", type=float, default=0.0, help="share of documents for held_out, a test set (default: 0)"
    )
    parser.add_argument(
        "--shard-tokens", type=argument_types.whole(), default=100_000_000, help="tokens per shard (default: 100000000)"
    )
    parser.add_argument(
        "--max-tokens",
        type=argument_types.whole(),
        help="stop after the document that reaches this many training tokens",
    )
    parser.add_argument(
        "--workers",
        type=argument_types.whole(),
        default=len(os.sched_getaffinity(0)),
        help="processes that tokenise, threads that shuffle or merge; the result is the same (default: the CPU cores)",
    )
    parser.add_argument(
        "--shuffle",
        type=argument_types.whole(),
        metavar="SEED",
        help="shuffle the documents of each split across its shards",
    )
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="prepare only the I-th (from 0) of N shares of the files, beside others who prepare theirs; then --merge",
    )
    parser.add_argument(
        "--add-bos",
        choices=("auto", "always", "never"),
        default="auto",
        help="put the tokenizer's bos_token before every document: as the tokenizer does with a text (auto, the default), "
        "or in any case, or never; training and exports follow what is put here",
    )
    parser.add_argument("--merge", action="store_true", help="join all the parts in --out")
    parser.add_argument("--import", choices=tuple(FORMATS), help="make shards of the token files --source")
    parser.add_argument("--dtype", choices=("uint16", "uint32"), help="what the raw numbers of --import olmo are")
    parser.add_argument("--export", choices=EXPORTED, help="write the shards --source as token files in --out")
    return parser


def _part(text: str) -> tuple[int, int]:
    if (match := re.fullmatch(r"(\d+)/(\d+)", text)) is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"'{text}' is not a part: write 0/16 for the first of 16, 15/16 for the last")
    return int(match[1]), int(match[2])


def _refuse_contradictions(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    modes = sorted(given & _NEEDS.keys())
    if len(modes) > 1:
        raise UserError(f"{_flags(modes)} are different things to do: give one of them.")
    if modes and (extra := given - _NEEDS[modes[0]] - _TAKES[modes[0]] - {modes[0]}):
        raise UserError(f"--{modes[0]} does not go with {_flags(extra)}: leave out one or the other.")
    if not modes and "dtype" in given:
        raise UserError("--dtype goes with --import alone: the tokenizer's vocabulary decides it for text.")
    if missing := (_NEEDS[modes[0]] if modes else _TEXT_NEEDS) - given:
        raise UserError(f"{_flags(missing)} must be given{f' with --{modes[0]}' if modes else ''}.")
    for name in sorted({"max_tokens", "shuffle"} & given if options.part else ()):
        instead = "give it to --merge" if name == "shuffle" else "a part cannot know what the others hold"
        raise UserError(f"--part does not go with {_flags([name])}: {instead}.")
    for name in ("val_fraction", "held_out_fraction"):
        if not 0 <= (value := getattr(options, name)) < 1:
            raise UserError(f"{_flags([name])} {value} is not a share: give 0 or more and less than 1.")
    if options.val_fraction + options.held_out_fraction >= 1:
        raise UserError("--val-fraction and --held-out-fraction leave nothing for train: together give less than 1.")
    for name in ("shard_tokens", "max_tokens", "workers"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"{_flags([name])} {value} is too small: give at least 1.")


def _only(source: list[str], flag: str) -> Path:
    if len(source) > 1:
        raise UserError(f"{flag} takes one --source, not {len(source)}.")
    return Path(source[0])


def _flags(names: Iterable[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-').replace('filters', 'filter')}" for name in sorted(names))
