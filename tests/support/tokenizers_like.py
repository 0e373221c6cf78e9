"""Small tokenizers in the shape of well-known ones, as their folders on the Hugging Face hub have it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
BEGIN, FINISH = "<|begin_of_text|>", "<|end_of_text|>"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_gpt2(folder: Path, texts: Sequence[str]) -> Path:
    """Write a byte-level BPE with one special token, which is bos, eos and unk."""
    backend = _byte_level(texts, [END])
    named = {"bos_token": END, "eos_token": END, "unk_token": END}
    return _write(folder, backend, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, **named})


def write_neox(folder: Path, texts: Sequence[str]) -> Path:
    """Write GPT-2's with NFC, and runs of spaces as added tokens that are not special."""
    backend = _byte_level(texts, [END, "<|padding|>"])
    backend.normalizer = normalizers.NFC()
    backend.add_tokens(["   ", "  "])
    named = {"bos_token": END, "eos_token": END, "unk_token": END}
    return _write(folder, backend, {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **named})


def write_qwen(folder: Path, texts: Sequence[str]) -> Path:
    """Write one without bos_token, of a class that transformers 5 rebuilds, with additional special tokens."""
    more = ["<|im_start|>", "<|im_end|>"]
    backend = _byte_level(texts, [END, *more], WORDS.replace("{1,3}", ""))
    backend.normalizer = normalizers.NFC()
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": more,
        "bos_token": None,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
        "split_special_tokens": False,
        "added_tokens_decoder": {
            str(backend.token_to_id(token)): {"content": token, "special": True, "normalized": False}
            for token in (END, *more)
        },
    }
    return _write(folder, backend, settings)


def write_llama3(folder: Path, texts: Sequence[str]) -> Path:
    """Write one whose post-processor puts BOS before every text."""
    backend = _byte_level(texts, [BEGIN, FINISH], WORDS)
    single, pair = f"{BEGIN}:0 $A:0", f"{BEGIN}:0 $A:0 {BEGIN}:1 $B:1"
    token = (BEGIN, backend.token_to_id(BEGIN))
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(single, pair, [token])]
    )
    named = {"bos_token": BEGIN, "eos_token": FINISH, "model_input_names": ["input_ids", "attention_mask"]}
    return _write(folder, backend, {"tokenizer_class": "PreTrainedTokenizerFast", **named})


def write_llama2(folder: Path, own: Path) -> Path:
    """Write the tokenizer of the folder `own` under a class for which only `add_bos_token` puts BOS before texts."""
    content = json.loads((own / "tokenizer.json").read_text()) | {"post_processor": None}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, **named}
    return _write(folder, Tokenizer.from_str(json.dumps(content)), settings)


def _byte_level(texts: Sequence[str], special: list[str], words: str | None = None) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    cut = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cut, byte_level]) if words else byte_level
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _write(folder: Path, backend: Tokenizer, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
