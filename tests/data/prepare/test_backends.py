"""Backends: gigatoken is chosen only if it gives the ids of `tokenizers`; otherwise the reason is printed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pretrain.data.bpe import tokenizer_from_sentencepiece
from pretrain.data.prepare import backends
from pretrain.data.prepare.backends import choose_backend, open_backend
from pretrain.data.tokenizer import load_tokenizer_info

TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(st.sampled_from("  \n\t\raAeéx01.,_(漢🎉▁<|/s>"))
KINDS = ["own", "byte_level", "special_rich"]


@pytest.fixture(scope="module")
def tokenizers(tokenizer_folder: Path, library_texts: list[str]) -> dict[str, str]:
    """Tokenizers as JSON: our own, one like GPT-2's, and one with special, other added and normalised tokens."""
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator(library_texts[::2], trainer)
    special_rich = Tokenizer.from_str(byte_level.to_str())
    special_rich.normalizer = normalizers.NFC()
    special_rich.add_special_tokens([AddedToken("</s>"), AddedToken("<|x|>", lstrip=True)])
    special_rich.add_tokens([AddedToken("    ", normalized=True), AddedToken("def ", normalized=False)])
    return {
        "own": load_tokenizer_info(tokenizer_folder).backend,
        "byte_level": byte_level.to_str(),
        "special_rich": special_rich.to_str(),
    }


def _ids(tokenizer: str, text: str) -> list[int]:
    """Encode with the `tokenizers` library itself."""
    reference = Tokenizer.from_str(tokenizer)
    reference.encode_special_tokens = True
    return reference.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", KINDS)
def test_gigatoken_is_taken_for_the_tokenizers_that_runs_have(
    tokenizers: dict[str, str], library_texts: list[str], kind: str
) -> None:
    choice = choose_backend(tokenizers[kind], library_texts[:4])
    assert choice.name == "gigatoken", choice.reason
    sample, references = library_texts[4::3], Tokenizer.from_str(tokenizers[kind])
    references.encode_special_tokens = True
    found = open_backend("gigatoken", tokenizers[kind]).encode([text.encode() for text in sample])
    assert [ids.tolist() for ids in found] == [references.encode(text, add_special_tokens=False).ids for text in sample]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tokenizers", "gigatoken"])
@given(text=TEXT)
@example(text="</s><s> <unk> <|endoftext|> <0x41> <|x|>")
@example(text="")
@example(text="\0 \x85 \u2028 e\u0301 ▁ ▁▁")
@example(text="x" * 70_000)
def test_any_text_gets_the_ids_of_tokenizers(tokenizers: dict[str, str], name: str, kind: str, text: str) -> None:
    (found,) = open_backend(name, tokenizers[kind]).encode([text.encode()])
    assert found.tolist() == _ids(tokenizers[kind], text)


def test_a_llama_like_tokenizer_is_judged_on_the_sample(
    tmp_path: Path, library_texts: list[str], tokenizers: dict[str, str]
) -> None:
    """A SentencePiece BPE that puts a space in front and keeps newlines as bytes."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in library_texts[::2] for line in text.split("\n") if line),
        model_prefix=str(tmp_path / "llama"),
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = tokenizer_from_sentencepiece(tmp_path / "llama.model").backend_tokenizer.to_str()
    choice = choose_backend(tokenizer, library_texts[:4])
    for text in library_texts[1::6]:
        (found,) = open_backend(choice.name, tokenizer).encode([text.encode()])
        assert found.tolist() == _ids(tokenizer, text)


def test_the_order_of_keys_in_the_file_does_not_matter(tokenizers: dict[str, str], library_texts: list[str]) -> None:
    content = json.loads(tokenizers["special_rich"])
    reordered = json.dumps({key: content[key] for key in reversed(content)})
    assert choose_backend(reordered, library_texts[:2]).name == "gigatoken"


def test_other_ids_on_the_sample_mean_the_other_library(
    tokenizers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = backends.Gigatoken.encode

    def wrong_on_teapots(self: backends.Gigatoken, contents: list[bytes]) -> list:
        found = zip(contents, encode(self, contents), strict=True)
        return [ids[:-1] if b"teapot" in content else ids for content, ids in found]

    monkeypatch.setattr(backends.Gigatoken, "encode", wrong_on_teapots)
    assert choose_backend(tokenizers["own"], ["a kettle"]).name == "gigatoken"
    choice = choose_backend(tokenizers["own"], ["a kettle", "a teapot"])
    assert choice.name == "tokenizers"
    assert "other ids on a sample, for 'a teapot'" in choice.reason


def test_a_tokenizer_that_gigatoken_cannot_load_is_left_to_tokenizers(tokenizers: dict[str, str]) -> None:
    word_level = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    choice = choose_backend(word_level.to_str(), ["a b"])
    assert choice.name == "tokenizers"
    assert "gigatoken cannot load this tokenizer" in choice.reason


def test_without_gigatoken_there_is_tokenizers(tokenizers: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    backends.open_backend.cache_clear()
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    assert choose_backend(tokenizers["own"], ["a"]) == backends.Choice(
        "tokenizers", "gigatoken, which is faster, is not installed"
    )


def test_renewing_the_cache_changes_no_ids(tokenizers: dict[str, str], library_texts: list[str]) -> None:
    contents = [text.encode() for text in library_texts[:5]]
    backend = backends.Gigatoken(tokenizers["own"])
    before = [ids.tolist() for ids in backend.encode(contents)]
    backend._encoded_bytes = backends.RENEW_BYTES + 1
    assert [ids.tolist() for ids in backend.encode(contents)] == before
    assert backend._encoded_bytes == sum(map(len, contents))
