"""The tokenizer: SentencePiece's own ids, exact round trips, and a fingerprint of its content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from pretrain.data import check_tokenizer, fingerprint, load_tokenizer, separator_id
from pretrain.data.bpe import SPACE, to_hugging_face, train_bpe
from pretrain.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
SPACED = st.text(st.sampled_from("  \n\t\raAeéx01.,_(漢🎉"))


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_held_out_text_gets_sentencepieces_own_ids(tokenizer, model_file: Path, library_texts: list[str]) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in library_texts[1::2]:
        assert encode(tokenizer, text) == processor.encode(text)


@given(text=TEXT | SPACED)
@example(text="</s><s> <unk> <0x41>")
@example(text="          ")
@example(text="▁ ▁▁")
def test_any_text_gets_sentencepieces_own_ids(tokenizer, model_file: Path, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert encode(tokenizer, text) == processor.encode(text)


@given(text=(TEXT | SPACED).filter(lambda text: SPACE not in text))
@example(text="  two  spaces \n\n\ttab\r\n ")
@example(text=" </s>")
def test_any_text_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(encode(tokenizer, text)) == text


def test_held_out_text_round_trips(tokenizer, library_texts: list[str]) -> None:
    for text in library_texts[1::2]:
        if SPACE not in text:
            assert tokenizer.decode(encode(tokenizer, text)) == text


def test_the_vocabulary_is_what_was_asked_for(tokenizer) -> None:
    assert len(tokenizer) == 1000
    assert [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert tokenizer.convert_ids_to_tokens([3, 258]) == ["<0x00>", "<0xFF>"]
    assert not [piece for piece in tokenizer.get_vocab() if "\n" in piece]
    assert not [piece for piece in tokenizer.get_vocab() if len(piece) > 1 and set(piece) <= set("0123456789")]


def test_training_again_gives_the_same_bytes(model_file: Path, library_texts: list[str]) -> None:
    assert train_bpe(library_texts[::2], 1000) == model_file.read_bytes()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused() -> None:
    with pytest.raises(UserError, match="vocabulary of 5000"):
        train_bpe(["only a few words"], 5000)
    with pytest.raises(UserError, match="vocabulary of 100"):
        train_bpe(["only a few words"], 100)
    with pytest.raises(UserError, match="vocabulary of 1000"):
        train_bpe([], 1000)


@pytest.mark.parametrize("options", [{}, {"user_defined_symbols": ["<|tool|>", "\n"], "add_dummy_prefix": False}])
def test_other_sentencepiece_bpes_load_with_their_own_ids(
    tmp_path: Path, library_texts: list[str], options: dict
) -> None:
    path = _train(tmp_path, library_texts, model_type="bpe", **options)
    tokenizer, processor = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in [*library_texts[1::4], "a <|tool|> b\n\n c", " x"]:
        assert encode(tokenizer, text) == processor.encode(text)
        if SPACE not in text:
            assert tokenizer.decode(encode(tokenizer, text)) == processor.decode(processor.encode(text))


def test_sentencepiece_models_that_cannot_be_reproduced_are_refused(tmp_path: Path, library_texts: list[str]) -> None:
    with pytest.raises(UserError, match="not a BPE model"):
        load_tokenizer(_train(tmp_path, library_texts, model_type="unigram"))
    with pytest.raises(UserError, match="does not reproduce"):
        load_tokenizer(_train(tmp_path, library_texts, model_type="bpe", normalization_rule_name="nmt_nfkc_cf"))
    with pytest.raises(UserError, match="does not reproduce"):
        load_tokenizer(_train(tmp_path, library_texts, model_type="bpe", user_defined_symbols=["<|tool|>"]))


def test_paths_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "text.model").write_text("not a model")
    for name in ("nowhere", "empty", "broken", "text.model"):
        with pytest.raises(UserError, match=f"'{tmp_path / name}'"):
            load_tokenizer(tmp_path / name)


def test_a_hub_name_is_never_looked_up() -> None:
    with pytest.raises(UserError, match="no tokenizer at 'gpt2'"):
        load_tokenizer("gpt2")


def test_the_fingerprint_survives_saving_copying_and_use(tokenizer, model_file: Path, tmp_path: Path) -> None:
    expected = fingerprint(tokenizer)
    assert fingerprint(load_tokenizer(model_file)) == expected
    tokenizer.save_pretrained(tmp_path / "again")
    shutil.copytree(tmp_path / "again", tmp_path / "elsewhere")
    loaded = load_tokenizer(tmp_path / "elsewhere")
    loaded(["a", "a longer one"], truncation=True, max_length=3)
    loaded.pad_token = loaded.eos_token
    assert fingerprint(loaded) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.pieces.pop(),
        lambda model: setattr(model.pieces[-1], "piece", "Ω"),
        lambda model: _swap_scores(model.pieces[300], model.pieces[301]),
        lambda model: setattr(model.trainer_spec, "eos_id", 1),
        lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", True),
    ],
    ids=["smaller", "another piece", "another merge order", "another eos", "another treatment of spaces"],
)
def test_the_fingerprint_tells_tokenizers_apart(model_file: Path, change: Callable[[ModelProto], object]) -> None:
    model = ModelProto.FromString(model_file.read_bytes())
    before = fingerprint(to_hugging_face(model))
    change(model)
    assert fingerprint(to_hugging_face(model)) != before


def test_a_tokenizer_without_end_of_sequence_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "no_eos")
    config = json.loads((tmp_path / "no_eos" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "no_eos" / "tokenizer_config.json").write_text(json.dumps(config))
    assert separator_id(load_tokenizer(tokenizer_folder)) == 2
    with pytest.raises(UserError, match="no end-of-sequence token"):
        separator_id(load_tokenizer(tmp_path / "no_eos"))


def test_shards_of_another_tokenizer_are_refused(tokenizer, make_shards) -> None:
    shards = make_shards(100)
    shards.tokenizer_fingerprint = fingerprint(tokenizer)
    check_tokenizer(shards, tokenizer, "data/tokenizer")
    shards.tokenizer_fingerprint = "abc"
    with pytest.raises(UserError, match=r"with another tokenizer .* than the run's 'data/tokenizer'") as caught:
        check_tokenizer(shards, tokenizer, "data/tokenizer")
    assert str(shards.folder) in str(caught.value)


def _train(folder: Path, texts: list[str], **options: object) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts[::2] for line in text.split("\n") if line),
        model_prefix=str(folder / "other"),
        vocab_size=800,
        byte_fallback=True,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    return folder / "other.model"


def _swap_scores(one, other) -> None:
    one.score, other.score = other.score, one.score
