"""The tokenizer: SentencePiece's own ids, exact round trips, and a fingerprint of its content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pretrain.data import check_tokenizer, fingerprint, load_tokenizer, separator_id
from pretrain.data.bpe import PROBE, SPACE, to_hugging_face, train_bpe
from pretrain.data.tokenizer import load_tokenizer_info
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
    with pytest.raises(UserError, match="holds no text"):
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
        for load in (load_tokenizer, load_tokenizer_info):
            with pytest.raises(UserError, match=f"'{tmp_path / name}'"):
                load(tmp_path / name)


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


def _byte_level(texts: list[str]) -> Tokenizer:
    """A tokenizer like GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _unigram(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<|endoftext|>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


EOS = "<|endoftext|>"
RICH = {
    "eos_token": EOS,
    "bos_token": AddedToken("<s>", lstrip=True),
    "pad_token": "<pad>",
    "additional_special_tokens": ["<|user|>", AddedToken("<|tool|>", rstrip=True)],
}


@pytest.mark.parametrize(
    ("make", "options", "tokenizer_class"),
    [
        (_byte_level, {"eos_token": EOS}, "TokenizersBackend"),
        (_byte_level, {"eos_token": EOS, "bos_token": EOS, "unk_token": EOS}, "PreTrainedTokenizerFast"),
        (_byte_level, {"eos_token": EOS}, "GPT2Tokenizer"),
        (_byte_level, RICH, "PreTrainedTokenizerFast"),
        (_byte_level, RICH | {"image_token": "<|image|>"}, "TokenizersBackend"),
        (_byte_level, {"eos_token": EOS, "truncation": True}, "TokenizersBackend"),
        (_unigram, {"eos_token": EOS, "unk_token": "<unk>"}, "TokenizersBackend"),
    ],
    ids=["plain", "named alike", "a class that rebuilds", "rich", "a token of its own", "truncating", "unigram"],
)
def test_the_info_is_that_of_the_tokenizer_that_training_loads(
    tmp_path: Path, library_texts: list[str], make: Callable, options: dict, tokenizer_class: str
) -> None:
    backend = make(library_texts[::4])
    if options.get("truncation"):
        backend.enable_truncation(5)
        backend.enable_padding(length=7)
    named = {key: value for key, value in options.items() if key != "truncation"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(tmp_path)
    _change_config(tmp_path, tokenizer_class=tokenizer_class)
    _check_info(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"additional_special_tokens": ["<|new|>"]},
        {"extra_special_tokens": {"image_token": "<|new|>"}},
        {"added_tokens_decoder": {"600": {"content": "<|new|>", "special": True}}},
        {"eos_token": {"content": "t", "lstrip": False, "__type": "AddedToken"}},
    ],
    ids=str,
)
def test_the_info_follows_what_the_configuration_adds(tmp_path: Path, library_texts: list[str], change: dict) -> None:
    PreTrainedTokenizerFast(tokenizer_object=_byte_level(library_texts[::4]), eos_token=EOS).save_pretrained(tmp_path)
    _change_config(tmp_path, **change)
    _check_info(tmp_path)


def test_the_info_follows_files_of_older_libraries(tmp_path: Path, library_texts: list[str]) -> None:
    PreTrainedTokenizerFast(tokenizer_object=_byte_level(library_texts[::4]), eos_token=EOS).save_pretrained(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<|new|>"}))
    _check_info(tmp_path)


def test_the_info_of_our_own_tokenizers(tokenizer_folder: Path, model_file: Path) -> None:
    _check_info(tokenizer_folder)
    _check_info(model_file)


def test_preparation_imports_neither_torch_nor_transformers(tokenizer_folder: Path) -> None:
    program = (
        "import sys\nfrom pretrain.data.prepare import prepare\nfrom pretrain.data.tokenizer import load_tokenizer_info\n"
        f"load_tokenizer_info({str(tokenizer_folder)!r})\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def _change_config(folder: Path, **change: object) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def _check_info(path: Path) -> None:
    """Compare the info from files with that from `transformers`, as training loads it."""
    tokenizer, info = load_tokenizer(path), load_tokenizer_info(path)
    assert info.fingerprint == fingerprint(tokenizer)
    assert (info.eos_id, info.vocab_size) == (tokenizer.eos_token_id, max(tokenizer.get_vocab().values()) + 1)
    backend = Tokenizer.from_str(info.backend)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    assert backend.encode(PROBE, add_special_tokens=False).ids == encode(tokenizer, PROBE)


def test_a_tokenizer_without_end_of_sequence_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "no_eos")
    config = json.loads((tmp_path / "no_eos" / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "no_eos" / "tokenizer_config.json").write_text(json.dumps(config))
    assert separator_id(load_tokenizer(tokenizer_folder)) == 2
    with pytest.raises(UserError, match="no end-of-sequence token"):
        separator_id(load_tokenizer(tmp_path / "no_eos"))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_tokenizer_info(tmp_path / "no_eos")


def test_shards_of_another_tokenizer_are_refused(tokenizer, make_shards) -> None:
    shards = make_shards(100)
    shards.tokenizer_fingerprint = fingerprint(tokenizer)
    check_tokenizer(shards, fingerprint(tokenizer), "data/tokenizer")
    shards.tokenizer_fingerprint = "abc"
    with pytest.raises(UserError, match=r"with another tokenizer .* than 'data/tokenizer'") as caught:
        check_tokenizer(shards, fingerprint(tokenizer), "data/tokenizer")
    assert shards.location in str(caught.value)


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
