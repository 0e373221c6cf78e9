"""Look into a corpus, or at the samples that a run reads from it. Nothing is trained and nothing is changed.

Which documents were in step 100 of a run, on the second of eight data-parallel ranks; one sample, decoded:

    python tools/inspect_data.py --config runs/tiny/config.yaml --step 100 --rank 1 --ranks 8
    python tools/inspect_data.py --config runs/tiny/config.yaml --sample 812 --text

What a corpus holds; whether its files are undamaged (else exit code 2 and a list of those that are not); and one document,
by its number in the corpus or in a shard (SHARD:D, as the tables print it):

    python tools/inspect_data.py --corpus data/stdlib/train --tokenizer data/tokenizer
    python tools/inspect_data.py --corpus data/stdlib/train --verify
    python tools/inspect_data.py --corpus data/stdlib/train --tokenizer data/tokenizer --document 0:12

Steps are counted from 1, as in metrics.jsonl; samples, ranks, shards, documents and tokens from 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli import argument_types
from pretrain.cli.parser import tool_parser
from pretrain.data.audit import tables
from pretrain.data.audit.damage import find_damage, open_unchecked
from pretrain.data.audit.documents import Decoder, Documents
from pretrain.data.audit.rollbacks import Positions
from pretrain.data.audit.statistics import describe_corpus
from pretrain.data.audit.trace import add_texts, trace
from pretrain.data.remote.cache import CacheSettings
from pretrain.data.remote.storage import is_remote
from pretrain.data.tokens.shards import TokenShards, open_shards
from pretrain.errors import UserError

if TYPE_CHECKING:
    from pretrain.config.schema import Config

# Each option here needs another one.
_NEEDS = {
    "step": "config",
    "sample": "config",
    "rank": "ranks",
    "ranks": "rank",
    "text": "config",
    "overrides": "config",
    "tokenizer": "corpus",
    "cache_folder": "corpus",
    "verify": "corpus",
    "document": "tokenizer",
}


def main() -> None:
    options = _parser().parse_args()
    _refuse_contradictions(options)
    if options.config:
        _show_run(options)
    elif options.verify:
        _verify(options)
    elif options.document:
        _document(options)
    else:
        shards = open_shards(options.corpus, verify="size", cache=_cache(options))
        statistics = describe_corpus(shards, _decoder(options, shards))
        _show(options, statistics, tables.corpus_tables(statistics))


def _show_run(options: argparse.Namespace) -> None:
    from pretrain.config.schema import load_config  # these take seconds to import
    from pretrain.data.tokenizer import load_tokenizer
    from pretrain.trainer.corpora import open_corpora

    config = load_config(options.config, options.overrides)
    samples = _samples(options, config)
    data = config.data.model_copy(update={"val": None, "verify": "size"})
    corpora = open_corpora(config.model_copy(update={"data": data}), load_tokenizer(config.tokenizer), data_ranks=1)
    traced = trace(corpora.feed(), samples, Decoder(config.tokenizer) if options.text else None)
    step = _positions(options, config).step_of(samples[0])
    whose = "" if options.rank is None else f", rank {options.rank} of {options.ranks}"
    which = f"sample {samples[0]:,}" if len(samples) == 1 else f"samples {samples[0]:,} to {samples[-1]:,}"
    shown = tables.trace_texts(traced, options.max_characters) if options.text else tables.trace_table(traced)
    read_by = "no step (left out)" if step is None else f"step {step:,} of {config.total_steps:,}"
    head = f"{read_by}{whose}: {which} of the run"
    _show(options, {"step": step, "samples": traced}, f"{head}\n\n{shown}")


def _samples(options: argparse.Namespace, config: Config) -> range:
    from pretrain.data.batches.loader import check_batch_sizes, slice_of_rank

    data, steps = config.data, config.total_steps
    positions = _positions(options, config)
    if options.sample is not None:
        if not 0 <= options.sample < (end := positions.before(steps + 1)):
            raise UserError(f"--sample {options.sample}: the run has 0 to {end - 1}.")
        return range(options.sample, options.sample + 1)
    if not 1 <= options.step <= steps:
        raise UserError(f"--step {options.step}: the run has 1 to {steps}.")
    before = positions.before(options.step)
    size = data.batch_sizes.at(before)
    if options.rank is None:
        return range(before, before + size)
    if not 0 <= options.rank < options.ranks:
        raise UserError(f"--rank {options.rank}: of {options.ranks} ranks there are 0 to {options.ranks - 1}.")
    check_batch_sizes(size, data.micro_batch_size, options.ranks)
    taken = slice_of_rank(size, options.rank, options.ranks)
    return range(before + taken.start, before + taken.stop)


def _positions(options: argparse.Namespace, config: Config) -> Positions:
    """Return the positions by the metrics beside the configuration, if it lies in a run folder."""
    return Positions(Path(options.config).with_name("metrics.jsonl"), config.data.batch_sizes)


def _verify(options: argparse.Namespace) -> None:
    shards = open_unchecked(options.corpus, _cache(options))
    decoder = _decoder(options, shards)
    report = find_damage(shards, decoder.info.vocab_size if decoder else None)
    faults = list(tables.damage_lines(report))
    checked = ["checksums and document ends" if report["checksums"] else "sizes and document ends (no checksums exist)"]
    if report["ids_below"] is not None:
        checked.append(f"ids below {report['ids_below']:,}")
    whole = f"whole: {report['shards']:,} shards, {report['bytes'] / 1e6:,.1f} MB; {', '.join(checked)}"
    _show(options, report, whole if not faults else "")
    if faults:
        listed = "\n  ".join(faults)
        raise UserError(f"'{options.corpus}' is damaged:\n  {listed}\nRestore these files, or prepare the data again.")


def _document(options: argparse.Namespace) -> None:
    shards = open_shards(options.corpus, verify="size", cache=_cache(options))
    documents = Documents(shards)
    shard, number = documents.find(options.document)
    document = documents.describe(shard, number, *documents.bounds(shard, number))
    if decoder := _decoder(options, shards):
        add_texts([document], shards.open_tokens(shard), decoder)
    file = shards.shards[shard].file
    _show(options, {"file": file, **document}, f"{file}\n{tables.document_text(document, options.max_characters)}")


def _show(options: argparse.Namespace, content: dict, text: str) -> None:
    if options.json:
        print(json.dumps(content, indent=2))
    elif text:
        print(text)


def _decoder(options: argparse.Namespace, shards: TokenShards) -> Decoder | None:
    if not options.tokenizer:
        return None
    decoder = Decoder(options.tokenizer)
    decoder.check(shards)
    return decoder


def _cache(options: argparse.Namespace) -> CacheSettings | None:
    """Return the cache of a run with the default settings. A local corpus needs none."""
    if not is_remote(options.corpus):
        return None
    from pretrain.config.data_section import CacheSection

    usual = CacheSection()
    folder = options.cache_folder or usual.path
    return CacheSettings(folder / "shards", int(usual.limit_gb * 1e9), usual.downloads)


def _refuse_contradictions(options: argparse.Namespace) -> None:
    given = {name for name, value in vars(options).items() if value is not None and value is not False and value != []}
    for name in sorted(given & _NEEDS.keys()):
        if _NEEDS[name] not in given:
            raise UserError(f"{_flag(name)} goes with {_flag(_NEEDS[name])}, which is not given.")
    if options.config and options.step is None and options.sample is None:
        raise UserError("--config goes with --step or --sample: say which part of the run to look at.")
    if options.ranks is not None and options.step is None:
        raise UserError("--rank and --ranks go with --step: a sample is the same on any number of ranks.")
    if options.max_characters < 1:
        raise UserError(f"--max-characters {options.max_characters} is too small: give at least 1.")


def _flag(name: str) -> str:
    return {"overrides": "--set"}.get(name, f"--{name.replace('_', '-')}")


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument(
        "--config", type=argument_types.path, metavar="YAML", help="run file, or the config.yaml of a run folder"
    )
    of.add_argument(
        "--corpus",
        type=argument_types.location,
        metavar="LOCATION",
        help="shard folder or URL, Megatron prefix, datatrove folder",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--step", type=argument_types.whole(), help="the samples of this optimizer step, from 1")
    part.add_argument("--sample", type=argument_types.whole(), help="this sample of the run, from 0")
    parser.add_argument("--rank", type=argument_types.whole(), help="only those of this data-parallel rank")
    parser.add_argument("--ranks", type=argument_types.whole(), help="how many data-parallel ranks there are")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="as in training"
    )
    parser.add_argument("--text", action="store_true", help="print the samples decoded")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    what.add_argument("--document", metavar="D", help="print this document decoded: D, or SHARD:D")
    parser.add_argument(
        "--tokenizer", type=argument_types.path, help="tokenizer of the corpus: folder or SentencePiece .model file"
    )
    parser.add_argument(
        "--cache-folder", type=argument_types.path, help="where remote shards are kept (default: as in training)"
    )
    parser.add_argument(
        "--max-characters",
        type=argument_types.whole(),
        default=1000,
        help="of each document that is printed (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON; texts are not cut")
    return parser
