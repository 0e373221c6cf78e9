"""Text to token shards, so that a preparation killed at any moment goes on and ends with the same bytes.

The tokens are written in the order of the source. Every second or so a journal records how far the source was read and
how long each file was then; whatever came later is cut off and made again. The manifests are written at the end.
"""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.contents import read_json
from pretrain.data.prepare.encoding import Encoded, Encoder, encode_in_order
from pretrain.data.prepare.progress import Progress
from pretrain.data.text.sources import Source
from pretrain.data.tokenizer import fingerprint, separator_id
from pretrain.data.tokens.shards import ShardWriter, TokenShards, open_shards, token_dtype
from pretrain.errors import UserError
from pretrain.files import NO_LOCKS, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOURNAL = "prepare.json"
COMMIT_INTERVAL_S = 1.0
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def prepare(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    *,
    val_fraction: float,
    shard_tokens: int,
    max_tokens: int | None,
    workers: int,
) -> dict[str, TokenShards]:
    """Write the shard folders out/train and, unless `val_fraction` is 0, out/val; return them by name.

    Goes on if the same preparation stopped earlier, returns at once if it is complete. `max_tokens` ends it at the
    first document end at or past that many training tokens. UserError for bad input, a folder that holds anything
    else, and a full disk.
    """
    settings = {
        "source": source.description,
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
        "max_tokens": max_tokens,
    }
    _refuse_foreign_files(out)
    with _clear_write_errors(out), _alone_in(out):
        journal = _load_journal(out, settings)
        if not journal["finished"]:
            preparation = _Preparation(source, tokenizer, out, journal)
            preparation.run(workers)
        return {split: open_shards(out / split, verify="size") for split in _splits(settings)}


class _Preparation:
    """A preparation under way: the source, a writer per split and the journal, which only ever move together."""

    def __init__(self, source: Source, tokenizer: PreTrainedTokenizerBase, out: Path, journal: dict) -> None:
        self.source = source
        self.out = out
        self.journal = journal
        self.settings = journal["settings"]
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        dtype = token_dtype(self.vocab_size)
        self.encoder = Encoder(
            _backend_json(tokenizer), separator_id(tokenizer), dtype, val_fraction=self.settings["val_fraction"]
        )
        self.writers = {
            split: ShardWriter(out / split, dtype, self.settings["shard_tokens"], journal["writers"].get(split))
            for split in _splits(self.settings)
        }
        if journal["cursor"] is not None:
            source.seek(journal["cursor"])

    def run(self, workers: int) -> None:
        """From where the journal stands to the end."""
        if not self._has_enough():
            self._encode_the_rest(workers)
        if not self.writers["train"].tokens:
            raise UserError(f"the source {self.settings['source']} holds no text, so there is nothing to write.")
        for split, writer in self.writers.items():
            writer.finish(self._description(split))
        self.journal["finished"] = True
        write_json(self.out / JOURNAL, self.journal)

    def _encode_the_rest(self, workers: int) -> None:
        progress = Progress(self.source.size_bytes, self._done())
        committed = time.monotonic()
        encoded = encode_in_order(self.encoder, self.source, workers)
        try:
            for unit, parts in encoded:
                self._write(parts)
                self.journal |= {"cursor": unit.cursor, "read_bytes": unit.read_bytes}
                if time.monotonic() - committed >= COMMIT_INTERVAL_S:
                    self._commit()
                    committed = time.monotonic()
                progress.update(self._done())
                if self._has_enough():
                    break
        finally:
            encoded.close()
            progress.close()
        self._commit()

    def _write(self, parts: dict[str, Encoded]) -> None:
        if (wanted := self._tokens_wanted()) is not None:
            parts["train"] = parts["train"].up_to(wanted)
        for split, writer in self.writers.items():
            writer.append(parts[split].tokens, parts[split].ends)
            self.journal["text_bytes"][split] += int(parts[split].text_bytes.sum())

    def _commit(self) -> None:
        self.journal["writers"] = {split: writer.commit() for split, writer in self.writers.items()}
        write_json(self.out / JOURNAL, self.journal)

    def _tokens_wanted(self) -> int | None:
        limit = self.settings["max_tokens"]
        return None if limit is None else limit - self.writers["train"].tokens

    def _has_enough(self) -> bool:
        wanted = self._tokens_wanted()
        return wanted is not None and wanted <= 0

    def _done(self) -> tuple[int, int, int]:
        """Bytes read (of files) or bytes of text (of a stream, whose size is not known), documents, tokens."""
        of_files = self.source.size_bytes is not None
        done_bytes = self.journal["read_bytes"] if of_files else sum(self.journal["text_bytes"].values())
        writers = self.writers.values()
        return done_bytes, sum(writer.documents for writer in writers), sum(writer.tokens for writer in writers)

    def _description(self, split: str) -> dict:
        return {
            "split": split,
            "text_bytes": self.journal["text_bytes"][split],
            "vocab_size": self.vocab_size,
            "eos_id": self.encoder.separator,
            "tokenizer_fingerprint": self.settings["tokenizer_fingerprint"],
            "source": self.settings["source"],
            "val_fraction": self.settings["val_fraction"],
        }


def _splits(settings: dict) -> tuple[str, ...]:
    return ("train", "val") if settings["val_fraction"] else ("train",)


def _backend_json(tokenizer: PreTrainedTokenizerBase) -> str:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no fast form (tokenizer.json), which prepares data. "
            "Convert it with transformers (`save_pretrained` of the fast class) and give that folder."
        )
    return backend.to_str()


def _refuse_foreign_files(out: Path) -> None:
    """UserError, before anything is written, if `out` holds files that no preparation recorded."""
    if not out.is_dir() or (out / JOURNAL).exists():
        return
    if unknown := [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]:
        raise UserError(
            f"'{out}' holds files that no preparation recorded ({', '.join(sorted(unknown)[:5])}). "
            "Nothing was changed; give --out an empty or new folder."
        )


def _load_journal(out: Path, settings: dict) -> dict:
    """The journal of this very preparation in `out`, or a new one for an empty folder."""
    path = out / JOURNAL
    if path.exists():
        journal = read_json(path)
        if journal.get("settings") != settings:
            raise UserError(_refusal(out, journal.get("settings", {}), settings))
        return journal
    journal = {
        "settings": settings,
        "cursor": None,
        "read_bytes": 0,
        "text_bytes": {split: 0 for split in _splits(settings)},
        "writers": {},
        "finished": False,
    }
    write_json(path, journal)
    return journal


def _refusal(out: Path, recorded: dict, asked: dict) -> str:
    recorded, asked = _flat(recorded), _flat(asked)
    changes = [
        f"{key} was {recorded.get(key)!r} and is now {asked.get(key)!r}"
        for key in sorted(recorded.keys() | asked.keys())
        if recorded.get(key) != asked.get(key)
    ]
    return (
        f"'{out}' holds another preparation: {'; '.join(changes)}. Nothing was changed; give the command (and source "
        "files) it was begun with to go on or see that it is complete, or another --out for this one."
    )


def _flat(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "source"} | {
        f"source {key}": value for key, value in settings.get("source", {}).items()
    }


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Make `out` and keep a second preparation out of it for as long as this one runs."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another preparation is writing to '{out}' at this moment. Wait for it or stop it."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield


@contextmanager
def _clear_write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        raise UserError(
            f"cannot write to '{out}': {error}. Nothing is lost: make room or mend the permissions, and run the same "
            "command again to go on."
        ) from error
