"""The tokenizer of a run: loaded from disk, never from the network, and identified by its content.

The fingerprint hashes what decides the ids of a text: vocabulary, merges, special ids, and the ids of a fixed probe text.
So it survives saving, copying and library upgrades, and changes when the meaning of a shard would.

Training takes the `transformers` tokenizer, since it is exported with the model. Preparing text takes `TokenizerInfo`,
which mostly comes from the files alone: `transformers` takes longer to import than 50 MB of text to encode.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from pretrain.data.bpe import PROBE, tokenizer_from_sentencepiece
from pretrain.data.declared import check_declared
from pretrain.data.json_files import content_hash, read_json
from pretrain.errors import UserError, first_line
from pretrain.files import require_utf8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pretrain.data.tokens.shards import TokenShards

# `transformers` loads these classes as tokenizer.json has them; its other classes rebuild the tokenizer in their own way.
_PLAIN_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
_OTHER_FILES = ("config.json", "special_tokens_map.json", "added_tokens.json")  # these may change the result


@dataclass(frozen=True)
class TokenizerInfo:
    """The part of a tokenizer that preparing text needs; the same whether files or `load_tokenizer` gave it.

    Attributes:
        backend: The `tokenizers` tokenizer as JSON.
        vocab_size: The largest id + 1.
        eos_id: The separator of documents.
        bos_id: The beginning-of-sequence token that it names.
        first_ids: The ids that it puts before every text.
        fingerprint: The fingerprint of its content.
    """

    backend: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    first_ids: tuple[int, ...]
    fingerprint: str


def load_tokenizer_info(path: str | Path) -> TokenizerInfo:
    """Return the part of the tokenizer in `path` that preparing text needs; UserError where `load_tokenizer` raises one."""
    return _info_from_files(Path(path)) or _info_of(load_tokenizer(path), Path(path))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in `path`: a Hugging Face tokenizer folder or a SentencePiece .model file; UserError otherwise."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"there is no tokenizer at '{path}'. Give a folder with tokenizer files or a SentencePiece .model file; "
            f"tools/train_tokenizer.py makes such a folder, and `hf download REPO --local-dir {path}` fetches one."
        )
    require_utf8(path, "the tokenizer")
    if path.is_file():
        return tokenizer_from_sentencepiece(path)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds here, from OSError to plain Exception
        raise UserError(
            f"cannot load a tokenizer from the folder '{path}': {first_line(error)}. "
            "It should hold tokenizer.json and tokenizer_config.json, as `save_pretrained` writes them."
        ) from error
    check_declared(path, tokenizer.get_vocab())
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return 32 hex digits that are equal for tokenizers that give every text the same ids, wherever they are stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _fingerprint(
        tokenizer.get_vocab(),
        [] if backend is None else _merges(json.loads(backend.to_str())["model"]),
        [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id],
        tokenizer(PROBE, add_special_tokens=False, split_special_tokens=True)["input_ids"],
    )


def separator_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends every document: the tokenizer's end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token, which separates documents. "
            "Name one as eos_token in its tokenizer_config.json."
        )
    return tokenizer.eos_token_id


def bos_before_documents(tokenizer: TokenizerInfo, add_bos: str = "auto") -> int | None:
    """Return the token that a preparation puts before every document, None for none.

    Args:
        tokenizer: The tokenizer.
        add_bos: "auto" does as the tokenizer does with a text, "always" takes the bos_token, "never" takes none.

    Raises:
        UserError: There is no such token, or more than one.
    """
    if add_bos == "never":
        return None
    if len(tokenizer.first_ids) > 1:
        raise UserError(
            f"the tokenizer puts {len(tokenizer.first_ids)} tokens before every text (ids {list(tokenizer.first_ids)}), and "
            "shards take one at most. Change its post_processor, or prepare without any: --add-bos never."
        )
    if tokenizer.first_ids:
        return tokenizer.first_ids[0]
    if add_bos == "always" and tokenizer.bos_id is None:
        raise UserError("the tokenizer names no bos_token to put before every document: leave out --add-bos always.")
    return tokenizer.bos_id if add_bos == "always" else None


def first_ids(tokenizer: PreTrainedTokenizerBase, path: str | Path) -> tuple[int, ...]:
    """Return the ids that `tokenizer`, loaded from `path`, puts before every text.

    transformers 5 passes over `add_bos_token` where there is a tokenizer.json; version 4 follows it, and so do we.
    """
    before, _ = put_around(text_tokenizer(tokenizer.backend_tokenizer.to_str()))
    if before or tokenizer.bos_token_id is None or not _asks_for_bos(Path(path)):
        return tuple(before)
    return (tokenizer.bos_token_id,)


def put_around(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor of `backend` puts before a text and after it."""
    bare, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def check_tokenizer(shards: TokenShards, found: str, folder: str | Path) -> None:
    """Raise UserError unless the shards were made with the tokenizer in `folder`, whose fingerprint is `found`.

    Other trainers' formats do not record their tokenizer; in those, only the ids are checked, elsewhere.
    """
    if shards.tokenizer_fingerprint not in (None, found):
        raise UserError(
            f"the shards in '{shards.location}' were made with another tokenizer (fingerprint "
            f"{shards.tokenizer_fingerprint}, {shards.vocab_size} tokens) than '{folder}' (fingerprint "
            f"{found}). Point `tokenizer` at the one they were made with, or prepare the data again."
        )


def _info_from_files(folder: Path) -> TokenizerInfo | None:
    """Return the info from the files in `folder`, or None where `transformers` may load something else from them."""
    if not all((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    config = read_json(folder / "tokenizer_config.json")
    if config.get("tokenizer_class") not in _PLAIN_CLASSES or "auto_map" in config:
        return None
    if any((folder / name).exists() for name in _OTHER_FILES):
        return None
    backend = (folder / "tokenizer.json").read_text(encoding="utf-8")
    try:
        tokenizer = text_tokenizer(backend)
    except Exception:  # `tokenizers` raises plain Exceptions; the caller's other way explains them
        return None
    if (before := put_around(tokenizer)[0]) == [] and config.get("add_bos_token") is True:
        return None
    added = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items()}
    named = {
        name: _content(token)
        for name, token in config.items()
        if name.endswith("_token") and isinstance(token, str | dict)
    }
    if "eos_token" not in named or not {*named.values(), *_other_tokens(config)} <= added.keys():
        return None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    check_declared(folder, vocabulary)
    special_ids = [added[named[name]] if name in named else None for name in ("unk_token", "bos_token", "eos_token")]
    return TokenizerInfo(
        backend=backend,
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=added[named["eos_token"]],
        bos_id=special_ids[1],
        first_ids=tuple(before),
        fingerprint=_fingerprint(
            vocabulary,
            _merges(json.loads(backend)["model"]),
            special_ids,
            tokenizer.encode(PROBE, add_special_tokens=False).ids,
        ),
    )


def _info_of(tokenizer: PreTrainedTokenizerBase, path: Path) -> TokenizerInfo:
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise UserError(
            f"the tokenizer '{tokenizer.name_or_path}' has no fast form (tokenizer.json), which prepares data. "
            "Convert it with transformers (`save_pretrained` of the fast class) and give that folder."
        )
    return TokenizerInfo(
        backend=backend.to_str(),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eos_id=separator_id(tokenizer),
        bos_id=tokenizer.bos_token_id,
        first_ids=first_ids(tokenizer, path),
        fingerprint=fingerprint(tokenizer),
    )


@lru_cache(maxsize=1)
def text_tokenizer(backend: str) -> Tokenizer:
    """Return the tokenizer in `backend` (JSON), set to encode special tokens in a text as text, like "</s>"."""
    tokenizer = Tokenizer.from_str(backend)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _other_tokens(config: dict) -> list[str]:
    """Return the tokens that tokenizer_config.json lists beside the named ones; `transformers` adds missing ones."""
    decoder = config.get("added_tokens_decoder") or {}
    extra = config.get("extra_special_tokens") or []
    return [
        _content(token)
        for tokens in (
            decoder.values(),
            config.get("additional_special_tokens") or [],
            extra.values() if isinstance(extra, dict) else extra,
        )
        for token in tokens
    ]


def _asks_for_bos(path: Path) -> bool:
    config = path / "tokenizer_config.json"
    return config.is_file() and read_json(config).get("add_bos_token") is True


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _fingerprint(
    vocabulary: dict[str, int], merges: list, special_ids: Sequence[int | None], probe_ids: Sequence[int]
) -> str:
    return content_hash(
        {"vocabulary": vocabulary, "merges": merges, "special_ids": list(special_ids), "probe_ids": list(probe_ids)}
    )


def _merges(model: dict) -> list:
    """Return the ordered part of the vocabulary: merge pairs of a BPE, scored pieces of a Unigram, else nothing."""
    if isinstance(model.get("vocab"), list):
        return model["vocab"]
    return [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges", [])]
