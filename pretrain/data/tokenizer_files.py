"""Writes tokenizer files with which transformers 4 and 5 and llama.cpp all give a text the ids of training.

`tokenizer.json` decides for transformers, so the class is the one that loads it unchanged in both versions. llama.cpp
reads `tokenizer.model` where there is one, and takes from `tokenizer_config.json` whether a space or BOS comes first.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from pretrain.data.bpe import PROBE, SPACE, to_sentencepiece
from pretrain.data.tokenizer import put_around, text_tokenizer
from pretrain.errors import UserError
from pretrain.files import write_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TOKENIZER, CONFIG, SENTENCEPIECE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
# Version 5 records with these keys how the tokenizer was loaded; version 4 takes some for settings.
_OF_THE_LOADING = ("is_local", "local_files_only", "trust_remote_code", "backend", "name_or_path", "auto_map")


def portable_files(tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, bytes]:
    """Return the content of each file, by name, for `tokenizer` as it was loaded from `path`."""
    return _Content.of(tokenizer, path).files()


def trained_files(tokenizer: PreTrainedTokenizerBase, path: Path, bos_id: int | None) -> dict[str, bytes]:
    """Return `portable_files` for a model whose training documents began with `bos_id`.

    Texts begin with that token then, and it is the bos_token. None: nothing is put before a text, and a bos_token that is
    named becomes the separator (as GPT-2's is), which ended the document before; any other has never been trained.
    """
    content = _Content.of(tokenizer, path)
    if bos_id is None:
        content.begin_with(None)
    else:
        token = tokenizer.convert_ids_to_tokens(bos_id)
        assert isinstance(token, str)  # for one id
        content.begin_with((token, bos_id))
    return content.files()


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write each of `files` into `folder`."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, content)


@dataclass
class _Content:
    """The content of tokenizer.json and of tokenizer_config.json, and of other files, by name."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    others: dict[str, bytes]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, path: Path) -> _Content:
        try:
            with tempfile.TemporaryDirectory() as temporary:
                tokenizer.save_pretrained(temporary)
                content, config = (json.loads((Path(temporary) / name).read_bytes()) for name in (TOKENIZER, CONFIG))
                templates = {
                    file.relative_to(temporary).as_posix(): file.read_bytes()
                    for file in Path(temporary).rglob("*.jinja")
                }
        except OSError as error:
            raise UserError(
                f"cannot write the tokenizer's files to a temporary folder: {error}. Make room, or name another: TMPDIR."
            ) from error
        found = cls(content | {"truncation": None, "padding": None}, _without_loading(config), templates)
        found._describe()
        found._bring_sentencepiece(path if path.is_file() else path / SENTENCEPIECE)
        return found

    def backend(self) -> Tokenizer:
        return text_tokenizer(json.dumps(self.tokenizer))

    def begin_with(self, bos: tuple[str, int] | None) -> None:
        """Make texts begin with this token and its id, or with nothing."""
        if put_around(self.backend()) != ([] if bos is None else [bos[1]], []):
            self.tokenizer["post_processor"] = _post_processor(self.tokenizer["post_processor"], bos)
        self.config |= {"add_bos_token": bos is not None, "add_eos_token": False}
        if bos is not None and _text(self.config.get("bos_token")) != bos[0]:
            self.config["bos_token"] = bos[0]
        if bos is None and self.config.get("bos_token") and self.config.get("eos_token"):
            self.config["bos_token"] = self.config["eos_token"]

    def files(self) -> dict[str, bytes]:
        return self.others | {
            TOKENIZER: json.dumps(self.tokenizer, ensure_ascii=False).encode(),
            CONFIG: (json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode(),
        }

    def _describe(self) -> None:
        """Write out settings that version 4 and llama.cpp would assume otherwise."""
        before, after = put_around(self.backend())
        self.config |= {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "add_bos_token": bool(before),
            "add_eos_token": bool(after),
        }
        if extra := self.config.pop("extra_special_tokens", None):
            self.config["additional_special_tokens"] = list(extra.values() if isinstance(extra, dict) else extra)
        self.config.pop("add_prefix_space", None)
        if "add_prefix_space" in (cut := self.tokenizer["pre_tokenizer"] or {}):
            self.config["add_prefix_space"] = cut["add_prefix_space"]

    def _bring_sentencepiece(self, file: Path) -> None:
        """Add the SentencePiece model in `file`, or one made from tokenizer.json if there is none, if the ids are the same."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # made at import

        content = file.read_bytes() if file.is_file() else to_sentencepiece(self.tokenizer)
        if not content or not _gives_the_ids_of(self.backend(), content):
            return
        model = ModelProto.FromString(content)
        self.others[SENTENCEPIECE] = content
        self.config["add_prefix_space"] = model.normalizer_spec.add_dummy_prefix
        later = [token for token in self.tokenizer["added_tokens"] if token["id"] >= len(model.pieces)]
        if later:  # llama.cpp looks for them here
            self.config["added_tokens_decoder"] = {
                str(token["id"]): {key: token[key] for key in token if key != "id"} for token in later
            }


def _gives_the_ids_of(backend: Tokenizer, model: bytes) -> bool:
    """Return whether `model` is one of SentencePiece that gives the probe text and all words of the vocabulary the same ids.

    Texts that begin with a space are left out: where one is put before every text, transformers 5 does not double it.
    """
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError:  # another library's file of that name
        return False
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    words = sorted(piece.replace(SPACE, " ") for piece in backend.get_vocab() if piece not in special)
    texts = [text.strip() for text in (PROBE, " ".join(words), "".join(words))]
    return processor.encode(texts) == [found.ids for found in backend.encode_batch(texts, add_special_tokens=False)]


def _without_loading(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_THE_LOADING}


def _post_processor(found: dict[str, Any] | None, bos: tuple[str, int] | None) -> dict[str, Any] | None:
    """Return a post-processor that puts `bos` before a text and nothing else, and treats offsets as `found` does."""
    parts = found.get("processors", [found]) if found else []
    kept = [part for part in parts if part["type"] == "ByteLevel"]
    if bos is not None:
        kept.append(_template(*bos))
    if len(kept) > 1:
        return {"type": "Sequence", "processors": kept}
    return kept[0] if kept else None


def _template(token: str, token_id: int) -> dict[str, Any]:
    def part(kind: str, name: str, text: int) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": text}}

    return {
        "type": "TemplateProcessing",
        "single": [part("SpecialToken", token, 0), part("Sequence", "A", 0)],
        "pair": [
            part(kind, name, text)
            for text, sequence in enumerate("AB")
            for kind, name in (("SpecialToken", token), ("Sequence", sequence))
        ],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _text(token: str | dict[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
