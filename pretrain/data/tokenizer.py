"""The tokenizer of a run: loaded from disk, never from the network, and known by its content.

The fingerprint hashes what decides which ids a text gets (vocabulary, merges, special ids, and the ids of a fixed
probe text), so it survives saving, copying and library upgrades, and changes when the meaning of a shard would.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.data.bpe import PROBE, tokenizer_from_sentencepiece
from pretrain.data.contents import content_hash
from pretrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.data.tokens.shards import TokenShards


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `path`: a Hugging Face tokenizer folder or a SentencePiece .model file; UserError otherwise."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"there is no tokenizer at '{path}'. Give a folder with tokenizer files or a SentencePiece .model file; "
            f"tools/train_tokenizer.py makes such a folder, and `hf download REPO --local-dir {path}` fetches one."
        )
    if path.is_file():
        return tokenizer_from_sentencepiece(path)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, from OSError to plain Exception
        raise UserError(
            f"cannot load a tokenizer from the folder '{path}': {_first_line(error)} "
            "It should hold tokenizer.json and tokenizer_config.json, as `save_pretrained` writes them."
        ) from error


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """32 hex digits that are equal for tokenizers that give every text the same ids, wherever they are stored."""
    return content_hash(
        {
            "vocabulary": tokenizer.get_vocab(),
            "merges": _merges(tokenizer),
            "special_ids": [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
            "probe_ids": tokenizer(PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"],
        }
    )


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that ends every document: the tokenizer's end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token, which separates documents. "
            "Name one as eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def check_tokenizer(shards: TokenShards, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """UserError unless the shards were made with this very tokenizer, which was loaded from `folder`."""
    if (found := fingerprint(tokenizer)) != shards.tokenizer_fingerprint:
        raise UserError(
            f"the shards in '{shards.folder}' were made with another tokenizer (fingerprint "
            f"{shards.tokenizer_fingerprint}, {shards.vocab_size} tokens) than the run's '{folder}' (fingerprint {found}, "
            f"{len(tokenizer)} tokens). Point `tokenizer` at the one they were made with, or prepare the data again."
        )


def _merges(tokenizer: PreTrainedTokenizerBase) -> list:
    """The order-dependent part of the vocabulary: merge pairs of a BPE, scored pieces of a Unigram, else nothing."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return []
    model = json.loads(backend.to_str())["model"]
    if isinstance(model.get("vocab"), list):
        return model["vocab"]
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
