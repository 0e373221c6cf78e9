"""The corpora that a run reads, checked against its tokenizer, cut into samples and mixed in the run's order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

import numpy as np
from transformers import PreTrainedTokenizerBase

from pretrain.config.data_section import DataSection
from pretrain.config.schema import Config
from pretrain.data import TokenShards, check_tokenizer, fingerprint, open_shards
from pretrain.data.batches.feed import Feed
from pretrain.data.batches.loader import check_enough_samples
from pretrain.data.batches.mixture import Mixture
from pretrain.data.batches.order import GlobalOrder, Order, WindowedOrder, derived_seed
from pretrain.data.batches.packing import BestFit
from pretrain.data.batches.samples import Concatenated, Samples
from pretrain.data.batches.stream import Stream
from pretrain.data.json_files import content_hash
from pretrain.data.remote.cache import CacheSettings
from pretrain.data.remote.storage import is_remote
from pretrain.data.tokenizer import first_ids, load_tokenizer
from pretrain.data.tokens.corpus import ENDS_DTYPE
from pretrain.errors import UserError


@dataclass(frozen=True)
class Corpora:
    """The training and validation samples of a run.

    Attributes:
        tokenizer_fingerprint: that of the run's tokenizer.
        bos_id: the token before every document. None if only the separator that ended the document before stands there.
        beginning: `bos_id` in words.
        sources: the samples of each corpus of `data.train`.
        val: the validation samples.
    """

    data: DataSection
    seed: int
    tokenizer_fingerprint: str
    bos_id: int | None
    beginning: str
    sources: tuple[Samples, ...]
    val: Samples | None

    @property
    def masked(self) -> bool:
        """Whether some targets do not count."""
        return self.sources[0].masked

    @cached_property
    def mixture(self) -> Mixture:
        """The source of each sample of the run."""
        return Mixture([source.weight for source in self.data.train])

    @property
    def fingerprint(self) -> str:
        """A digest of the tokens in every sample of the run, given its seed and sequence length."""
        data = self.data
        parts = [
            [source.shards.fingerprint for source in self.sources],
            [str(weight) for weight in self.mixture.weights],
        ]
        windows = data.shuffle.window_shards if data.shuffle.scope == "windowed" else None
        return content_hash([*parts, windows, data.packing, data.document_attention])

    def feed(self) -> Feed:
        """Return the training samples in the run's order. The caller closes it."""
        streams = [
            Stream(samples, self._order(samples, derived_seed(self.seed, number)))
            for number, samples in enumerate(self.sources)
        ]
        return Feed(streams, self.mixture)

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often each corpus has been read, by its path, after the run's first `samples` samples."""
        taken = self.mixture.taken(samples).tolist()
        return {
            source.path: count / held.counts.sum().item()
            for source, held, count in zip(self.data.train, self.sources, taken, strict=True)
        }

    def describe(self, samples: int) -> str:
        """Describe the corpora in lines for a person, for a run of `samples` samples."""
        lines = []
        for source, weight, (path, epochs) in zip(
            self.sources, self.mixture.weights, self.epochs(samples).items(), strict=True
        ):
            share = f", {float(weight):.2%} of the samples" if len(self.sources) > 1 else ""
            lines.append(
                f"{source.shards.tokens:,} training tokens of {path}{share}; the run takes {epochs:.2f} epochs of them"
            )
        utilizations = [source.utilization for source in self.sources if isinstance(source, BestFit)]
        if utilizations:
            lines.append(f"whole documents packed: {min(utilizations):.2%} of the places hold a target")
        return ("\n" + " " * 10).join([*lines, self.beginning])

    def _order(self, samples: Samples, seed: int) -> Order:
        shuffle = self.data.shuffle
        if shuffle.scope == "global":
            return GlobalOrder(samples.counts, seed)
        return WindowedOrder(samples.counts, seed, shuffle.window_shards)


def open_corpora(
    config: Config, tokenizer: PreTrainedTokenizerBase, data_ranks: int, rank: int | None = None, world_size: int = 1
) -> Corpora:
    """Open the corpora that `config.data` names.

    Args:
        data_ranks: groups of ranks that read batches of their own.
        rank: the rank that verifies its share of the shards, of `world_size` ranks. None verifies all of them.

    Raises:
        UserError: a corpus is damaged, was made with another tokenizer, holds too little, or is too large for the cache.
    """
    data = config.data
    digest, vocab_size = fingerprint(tokenizer), max(tokenizer.get_vocab().values()) + 1
    cache = CacheSettings(data.cache.path / "shards", int(data.cache.limit_gb * 1e9), data.cache.downloads)
    share = {} if rank is None else {"rank": rank, "world_size": world_size}

    def opened(location: str) -> Samples:
        shards = open_shards(location, verify=data.verify, vocab_size=vocab_size, cache=cache, **share)
        check_tokenizer(shards, digest, config.tokenizer)
        return _cut(shards, data, vocab_size)

    sources = tuple(opened(source.path) for source in data.train)
    val = opened(data.val) if data.val else None
    bos_id = _bos_id([samples.shards for samples in (*sources, *([val] if val else []))], tokenizer)
    beginning = _beginning(bos_id, first_ids(tokenizer, config.tokenizer), tokenizer, data.document_attention)
    corpora = Corpora(data, config.seed, digest, bos_id, beginning, sources, val)
    _check_cache(corpora, config.eval.batches * data.largest_batch)
    ranks = data_ranks if len(sources) == 1 else 1  # of a mixture a rank may have no sample of some source
    for samples, weight in zip(sources, corpora.mixture.weights, strict=True):
        check_enough_samples(samples, ceil(weight * data.largest_batch), ranks)
    return corpora


def _bos_id(corpora: list[TokenShards], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token before every document of all `corpora`. UserError if they differ in it."""
    ids = [shards.bos_before_documents(tokenizer.bos_token_id, tokenizer.eos_token_id) for shards in corpora]
    for shards, bos_id in zip(corpora, ids, strict=True):
        if bos_id != ids[0]:
            raise UserError(
                f"every document of '{corpora[0].location}' begins with {_named(ids[0], tokenizer)}, of "
                f"'{shards.location}' with {_named(bos_id, tokenizer)}. What precedes a document is one thing in a run: "
                "prepare one of them again (tools/prepare_data.py, --add-bos always or never)."
            )
    return ids[0]


def _beginning(
    bos_id: int | None, first: tuple[int, ...], tokenizer: PreTrainedTokenizerBase, document_attention: bool
) -> str:
    """Describe what precedes a document. first: the ids that the tokenizer itself puts before a text."""
    if bos_id is not None:
        text = f"every document begins with {_named(bos_id, tokenizer)}, and so will every text of an export"
    elif document_attention:
        text = "nothing precedes a document that its first token could attend to (--add-bos always puts a token there)"
    else:
        text = "a document is preceded by the separator of the one before, and exports put nothing before a text"
    if first != (() if bos_id is None else (bos_id,)):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(list(first)))
        text += f"; the tokenizer itself would put {tokens or 'nothing'} there"
    return text


def _named(bos_id: int | None, tokenizer: PreTrainedTokenizerBase) -> str:
    return "no token of its own" if bos_id is None else f"{tokenizer.convert_ids_to_tokens(bos_id)} (id {bos_id})"


def _cut(shards: TokenShards, data: DataSection, vocab_size: int) -> Samples:
    if data.packing == "best_fit":
        return BestFit(shards, data.seq_len, data.cache.path / "packing", data.document_attention, vocab_size)
    return Concatenated(shards, data.seq_len, data.document_attention, vocab_size)


def _check_cache(corpora: Corpora, val_samples: int) -> None:
    """Raise UserError unless the cache holds what a rank needs at a time of all remote corpora together."""
    data = corpora.data
    windowed = data.shuffle.scope == "windowed"
    sizes = {samples.shards.location: _held_at_once(samples, data) for samples in corpora.sources}
    if corpora.val is not None:
        touched = int(np.searchsorted(np.cumsum(corpora.val.counts), val_samples)) + 1
        sizes[corpora.val.shards.location] = sum(_bytes(corpora.val)[:touched])
    remote = {location: size for location, size in sizes.items() if is_remote(location)}
    if sum(remote.values()) > data.cache.limit_gb * 1e9:
        needs = ", ".join(f"{location} {size / 1e9:.3g} GB" for location, size in remote.items())
        raise UserError(
            f"data.cache.limit_gb is {data.cache.limit_gb:g}, and what is read of remote corpora at a time is more "
            f"({needs}). Raise it, or "
            + ("lower data.shuffle.window_shards." if windowed else "set data.shuffle.scope to windowed.")
        )


def _held_at_once(samples: Samples, data: DataSection) -> int:
    """Return the bytes of the shards that are needed together: of two windows, or all if any sample may come next."""
    sizes = sorted(_bytes(samples), reverse=True)
    return sum(sizes[: 2 * data.shuffle.window_shards] if data.shuffle.scope == "windowed" else sizes)


def _bytes(samples: Samples) -> list[int]:
    """Return the bytes of each shard, with the ends of its documents."""
    return [shard.bytes + ENDS_DTYPE.itemsize * shard.documents for shard in samples.shards.shards]


def read_again(config: Config) -> Feed:
    """Open the training samples of a run a second time, beside its loader. UserError if they are gone."""
    data = config.data.model_copy(update={"val": None, "verify": "size"})
    return open_corpora(config.model_copy(update={"data": data}), load_tokenizer(config.tokenizer), data_ranks=1).feed()
