"""Turns text into token shards; a preparation killed at any moment can continue and ends with the same bytes.

The tokens are written in the order of the source. Every few seconds the journal records the cursor of the source and the
length of each file. What a killed process wrote after that is cut off and made again. The manifests are written at the
end. A shuffled preparation first does all this in a hidden folder, from which `shuffle` writes the shards.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.data.prepare.encoding import Encoded, Encoder, encode_in_order
from pretrain.data.prepare.journal import Journal, forget, splits_of, written
from pretrain.data.prepare.ledger import SourceLedger
from pretrain.data.prepare.output_folder import UNSHUFFLED, refuse_unrecorded_files, remove, writing_in
from pretrain.data.prepare.parts import refuse_parts, writing_part
from pretrain.data.prepare.shuffle import shuffle
from pretrain.data.progress import Progress
from pretrain.data.text.faults import Fault, advice_on
from pretrain.data.text.omissions import Omissions
from pretrain.data.text.sources import Source
from pretrain.data.tokenizer import TokenizerInfo, bos_before_documents
from pretrain.data.tokens.shards import TokenShards, open_shards
from pretrain.data.tokens.writer import token_dtype
from pretrain.errors import UserError


@dataclass(frozen=True)
class Tolerance:
    """The policy for records that give no text. It does not identify a preparation."""

    skip_unreadable: bool
    max_bad_share: float


class _NoTraining(UserError):
    """An error for a preparation without a document to train on."""


def prepare(
    source: Source,
    tokenizer: TokenizerInfo,
    out: Path,
    *,
    val_fraction: float,
    shard_tokens: int,
    workers: int,
    held_out_fraction: float = 0.0,
    max_tokens: int | None = None,
    shuffle_seed: int | None = None,
    part: tuple[int, int] | None = None,
    skip_unreadable: bool = False,
    max_bad_share: float = 0.01,
    add_bos: str = "auto",
) -> dict[str, TokenShards]:
    """Write the shard folders out/train and, where their fractions are not 0, out/val and out/held_out; return them.

    A preparation that stopped earlier continues; one that is complete returns at once.

    Args:
        source: The source of text.
        tokenizer: The tokenizer.
        out: The folder to write to: new, empty, or that of the same preparation.
        val_fraction: The share of documents for val.
        shard_tokens: The tokens of a shard, about.
        workers: The number of processes that encode, and of threads that shuffle.
        held_out_fraction: The share of documents for held_out.
        max_tokens: Stop at the first document end at or past this many training tokens.
        shuffle_seed: Put the documents of each split in an order that depends on this seed and their number alone.
        part: (number, count): `source` is this share of a larger one. It gets a folder of its own below `out` until
            `merge` joins them.
        skip_unreadable: Leave out and name damaged parts and records without text. A preparation that began without
            this may continue with it.
        max_bad_share: The share of records that may be left out so.
        add_bos: The token before documents, as in `bos_before_documents`.

    Returns:
        The corpus of each split.

    Raises:
        UserError: The input is bad, the folder holds anything else, or the disk is full.
    """
    tolerance = Tolerance(skip_unreadable, max_bad_share)
    settings: dict[str, Any] = {
        "source": source.description,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "val_fraction": val_fraction,
        "held_out_fraction": held_out_fraction,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    if (bos_id := bos_before_documents(tokenizer, add_bos)) is not None:
        settings["bos_id"] = bos_id
    if part is not None:
        with writing_part(out, part) as folder:
            _tokenise(source, tokenizer, folder, settings | {"part": list(part)}, workers, tolerance)
            return _opened(folder, settings)
    refuse_parts(out)
    refuse_unrecorded_files(out)
    with writing_in(out):
        try:
            if shuffle_seed is None:
                _tokenise(source, tokenizer, out, settings, workers, tolerance)
            else:
                _tokenise_and_shuffle(source, tokenizer, out, settings, workers, tolerance, shuffle_seed)
        except _NoTraining:
            forget(out, settings)
            raise
        return _opened(out, settings)


def _tokenise_and_shuffle(
    source: Source,
    tokenizer: TokenizerInfo,
    out: Path,
    settings: dict,
    workers: int,
    tolerance: Tolerance,
    seed: int,
) -> None:
    journal = Journal(out, settings | {"shuffle": seed})
    if not journal.finished:
        _tokenise(source, tokenizer, out / UNSHUFFLED, settings, workers, tolerance)
        shuffle([out / UNSHUFFLED], journal, workers)
    remove(out / UNSHUFFLED)


def _tokenise(
    source: Source, tokenizer: TokenizerInfo, out: Path, settings: dict, workers: int, tolerance: Tolerance
) -> None:
    """Write the documents in the order of the source to out/train and so on; continue where this was stopped."""
    out.mkdir(exist_ok=True)
    journal = Journal(out, settings)
    if not journal.finished:
        _Tokenisation(source, tokenizer, journal, tolerance).run(workers)


class _Tokenisation:
    """The source, the writers, the ledger and the journal, which always move together."""

    def __init__(self, source: Source, tokenizer: TokenizerInfo, journal: Journal, tolerance: Tolerance) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.journal = journal
        self.settings = journal.settings
        dtype = token_dtype(tokenizer.vocab_size)
        self.encoder = Encoder(
            tokenizer.backend,
            tokenizer.eos_id,
            dtype,
            val_fraction=self.settings["val_fraction"],
            bos_id=self.settings.get("bos_id"),
            held_out_fraction=self.settings["held_out_fraction"],
            skip_unreadable=tolerance.skip_unreadable,
        )
        self.writers = journal.open_writers(dtype)
        self.state = journal.state
        if self.state:
            source.seek(self.state["cursor"])
        else:
            self.state |= {"cursor": source.cursor(), "read_bytes": 0, "open_sources": {}}
            self.state["text_bytes"] = dict.fromkeys(self.writers, 0)
        self.ledger = SourceLedger(journal)
        note = partial(journal.note, "unreadable", None)
        self.omissions = Omissions(source.files, tolerance.max_bad_share, self.state.setdefault("left_out", {}), note)

    def run(self, workers: int) -> None:
        """Work from the last commit to the end."""
        if not self._has_enough():
            self._encode_the_rest(workers)
        self.omissions.close()
        if not self.writers["train"].tokens and "part" not in self.settings:
            raise _NoTraining(self._why_nothing())
        if files := self._files_without_text():
            some = ", ".join([*files[:3], "..."] if len(files) > 3 else files)
            print(
                f"without text: {len(files):,} of {len(self.source.files):,} files ({some})",
                file=sys.stderr,
                flush=True,
            )
        for split, writer in self.writers.items():
            writer.finish(self._description(split))
        self.journal.finish()

    def _encode_the_rest(self, workers: int) -> None:
        print(self.source.listing, file=sys.stderr, flush=True)
        progress = Progress("tokenised", self.source.size_bytes, self._done())
        encoded = encode_in_order(self.encoder, self.source, workers)
        try:
            for unit, parts, tally in encoded:
                self.omissions.add(tally)
                self._write(parts)
                self.state |= {"cursor": unit.cursor, "read_bytes": unit.read_bytes}
                self.journal.commit_if_due()
                progress.update(self._done())
                if self._has_enough():
                    break
        except Fault as error:
            raise advice_on(error, self.omissions.good + error.before) from error
        finally:
            encoded.close()
            progress.close()
        self.source.check_unchanged()
        self.journal.commit()

    def _write(self, parts: dict[str, Encoded]) -> None:
        if (wanted := self._tokens_wanted()) is not None:
            parts["train"] = parts["train"].up_to(wanted)
        for split, writer in self.writers.items():
            documents = parts[split]
            writer.append(documents.tokens, documents.ends)
            self.ledger.add(split, documents, self.source.files)
            self.state["text_bytes"][split] += int(documents.text_bytes.sum())

    def _tokens_wanted(self) -> int | None:
        limit = self.settings["max_tokens"]
        return None if limit is None else limit - self.writers["train"].tokens

    def _has_enough(self) -> bool:
        wanted = self._tokens_wanted()
        return wanted is not None and wanted <= 0

    def _done(self) -> tuple[int, int, int]:
        """Return the bytes read, the documents and the tokens so far."""
        documents, tokens = written(self.writers)
        return self.state["read_bytes"], documents, tokens

    def _files_without_text(self) -> list[str]:
        """Return the files that were read to their end and gave no document."""
        given = {entry["path"] for split in self.writers for entry in self.ledger.sources(split)}
        read = self.source.files[: self.state["cursor"][0]]
        return [file["path"] for file in read if file["path"] not in given]

    def _why_nothing(self) -> str:
        others = [split for split, writer in self.writers.items() if writer.documents]
        source = self.settings["source"]
        name = " ".join(source.get("paths", [source.get("name", "stdlib")]))
        if not others:
            why = self.omissions.why_nothing(source["filters"])
            return f"the source '{name}' holds no text{why}, so there is nothing to write."
        return (
            f"all {written(self.writers)[0]} documents of the source '{name}' fell into "
            f"{' and '.join(others)}, so none is left to train on. Nothing was kept; set aside a smaller share, or give "
            "more documents."
        )

    def _description(self, split: str) -> dict:
        return {
            "split": split,
            "text_bytes": self.state["text_bytes"][split],
            "vocab_size": self.tokenizer.vocab_size,
            "eos_id": self.tokenizer.eos_id,
            "bos_id": self.settings.get("bos_id"),
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "source": self.settings["source"],
            "val_fraction": self.settings["val_fraction"],
            "held_out_fraction": self.settings["held_out_fraction"],
            "shuffle": None,
            "sources": self.ledger.sources(split),
            "unreadable": self.journal.noted("unreadable", None),
            "left_out": self.omissions.sums | {"files_without_text": len(self._files_without_text())},
        }


def _opened(out: Path, settings: dict) -> dict[str, TokenShards]:
    return {split: open_shards(out / split, verify="size") for split in splits_of(settings)}
