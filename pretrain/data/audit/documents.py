"""Documents of a corpus: found by their number, traced to their source file, and decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pretrain.data.batches.order import SampleOrder
from pretrain.data.tokenizer import TokenizerInfo, check_tokenizer, load_tokenizer_info
from pretrain.data.tokens.corpus import TokenShards
from pretrain.errors import UserError


class Documents:
    """The documents of one corpus, numbered from 0 in each shard, or through all shards in their order."""

    def __init__(self, shards: TokenShards) -> None:
        self.shards = shards
        self._firsts = np.cumsum([0, *(shard.documents for shard in shards.shards)])
        # Other trainers' files, and our oldest, have no record of their sources.
        sources = shards.manifest.get("sources", [])
        self._paths = [source["path"] for source in sources]
        self._source_ends = np.cumsum([0, *(source["documents"] for source in sources)])
        shuffle = shards.manifest.get("shuffle")
        self._order = SampleOrder(shards.documents, shuffle["seed"]) if shuffle and shards.documents else None

    def find(self, name: str) -> tuple[int, int]:
        """Return the shard of a document and its number there.

        Args:
            name: The number of the document in the corpus ("7"), or shard and number in it ("0:7").

        Raises:
            UserError: There is no such document.
        """
        first, colon, last = name.rpartition(":")
        if not (last.isdecimal() and (first.isdecimal() if colon else True)):
            raise UserError(f"--document {name}: give a number such as 7, or shard and number such as 0:7.")
        number, count = int(last), len(self.shards.shards)
        if colon and int(first) >= count:
            raise UserError(f"--document {name}: '{self.shards.location}' has {count} shards, numbered from 0.")
        held = self.shards.shards[int(first)].documents if colon else self.shards.documents
        if number >= held:
            where = f"shard {first} of '{self.shards.location}'" if colon else f"'{self.shards.location}'"
            raise UserError(f"--document {name}: {where} has {held} documents, numbered from 0.")
        if colon:
            return int(first), number
        shard = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return shard, number - int(self._firsts[shard])

    def bounds(self, shard: int, number: int) -> tuple[int, int]:
        """Return the first token of a document in its shard, and the one after its last."""
        ends = self.shards.open_ends(shard)
        return int(ends[number - 1]) if number else 0, int(ends[number])

    def describe(self, shard: int, number: int, start: int, stop: int) -> dict:
        """Describe tokens start .. stop - 1 of a shard, which are in its document `number`, and their origin.

        Returns:
            JSON. `source` is the path of the source file. `source_document` counts, from 0, the documents that this
            corpus has of that file. Both are None where the origin is not known.
        """
        source, source_document = self._origin(int(self._firsts[shard]) + number)
        return {
            "document": f"{shard}:{number}",
            "tokens": [start, stop],
            "source": source,
            "source_document": source_document,
        }

    def _origin(self, document: int) -> tuple[str, int] | tuple[None, None]:
        if self._source_ends[-1] != self.shards.documents:
            return None, None
        made = document if self._order is None else self._order[document]
        source = int(np.searchsorted(self._source_ends, made, side="right")) - 1
        return self._paths[source], made - int(self._source_ends[source])


class Decoder:
    """Turns ids into text, special tokens included."""

    def __init__(self, folder: str | Path) -> None:
        """Load the tokenizer in `folder`; UserError if there is none."""
        self.folder = folder
        self.info: TokenizerInfo = load_tokenizer_info(folder)
        self._tokenizer = Tokenizer.from_str(self.info.backend)

    def text(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=False)

    def token(self, number: int) -> str:
        """Return one token as text, or, if it is only a part of a character, its name in the vocabulary."""
        text = self._tokenizer.decode([number], skip_special_tokens=False)
        return text if text and "\ufffd" not in text else self._tokenizer.id_to_token(number) or ""

    def check(self, shards: TokenShards) -> None:
        """Raise UserError if the corpus records another tokenizer."""
        check_tokenizer(shards, self.info.fingerprint, self.folder)
