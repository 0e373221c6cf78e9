"""The tokenizer files beside a model: every reader gives the ids of training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from pretrain.data import fingerprint, load_tokenizer
from pretrain.data.bpe import PROBE
from pretrain.data.tokenizer import bos_before_documents, first_ids, load_tokenizer_info
from pretrain.data.tokenizer_files import portable_files, trained_files, write_files
from pretrain.errors import UserError
from tests.support.tokenizers_like import BEGIN, END, write_gpt2, write_llama2, write_llama3, write_neox, write_qwen

SHAPES = ("own", "gpt2", "neox", "qwen", "llama3", "llama2")
BEGINS = {"llama3": BEGIN, "llama2": "<s>"}  # the others put nothing before a text
FINDS = [
    PROBE,
    "  two   spaces",
    "x",
]


@pytest.fixture(scope="module")
def shapes(
    tmp_path_factory: pytest.TempPathFactory, library_texts: list[str], tokenizer_folder: Path, model_file: Path
) -> dict[str, Path]:
    folder, texts = tmp_path_factory.mktemp("shapes"), library_texts[::4]
    own = Path(shutil.copytree(tokenizer_folder, folder / "own"))
    shutil.copyfile(model_file, own / "tokenizer.model")
    byte_level = {"gpt2": write_gpt2, "neox": write_neox, "qwen": write_qwen, "llama3": write_llama3}
    made = {name: write(folder / name, texts) for name, write in byte_level.items()}
    return made | {"own": own, "llama2": write_llama2(folder / "llama2", own)}


@pytest.fixture
def as_trained(shapes: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """as_trained(shape, add_bos) -> the folder of files beside a model of documents that were prepared so."""

    def make(shape: str, add_bos: str = "auto") -> Path:
        bos_id = bos_before_documents(load_tokenizer_info(shapes[shape]), add_bos)
        write_files(trained_files(load_tokenizer(shapes[shape]), shapes[shape], bos_id), tmp_path / shape)
        return tmp_path / shape

    return make


def settings_of(folder: Path) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text())


def bare_ids(folder: Path, text: str) -> list[int]:
    """Encode with `tokenizers` alone, from the files that a user gave."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_get_the_ids_of_training_behind_what_began_documents(shape: str, shapes, as_trained) -> None:
    source, folder = shapes[shape], as_trained(shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begun = [tokenizer.convert_tokens_to_ids(BEGINS[shape])] if shape in BEGINS else []
    for text in FINDS:
        found = tokenizer(text)
        assert found["input_ids"] == begun + bare_ids(source, text)
        assert list(found) == ["input_ids", "attention_mask"]
    assert tokenizer.bos_token == BEGINS.get(shape, {"own": "</s>", "qwen": None}.get(shape, END))
    info = load_tokenizer_info(folder)
    assert (info.first_ids, info.eos_id) == (tuple(begun), load_tokenizer_info(source).eos_id)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_files_name_a_class_of_both_versions_and_nothing_of_this_machine(shape: str, as_trained) -> None:
    folder = as_trained(shape)
    settings, text = settings_of(folder), (folder / "tokenizer_config.json").read_text()
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (shape in BEGINS, False)
    assert not settings.keys() & {"is_local", "local_files_only", "backend", "name_or_path", "extra_special_tokens"}
    assert str(folder.parent) not in text
    if shape == "qwen":
        assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]


@pytest.mark.parametrize("shape", ["gpt2", "neox", "qwen", "llama3", "llama2"])
def test_what_needed_no_other_name_is_the_same_tokenizer(shape: str, shapes, as_trained) -> None:
    assert fingerprint(load_tokenizer(as_trained(shape))) == fingerprint(load_tokenizer(shapes[shape]))


def test_bos_goes_and_comes_as_the_documents_were_prepared(shapes, as_trained) -> None:
    without = AutoTokenizer.from_pretrained(as_trained("llama3", "never"))
    assert without("x")["input_ids"] == bare_ids(shapes["llama3"], "x")
    assert without.bos_token == without.eos_token == "<|end_of_text|>"
    given = AutoTokenizer.from_pretrained(as_trained("own", "always"))
    assert given("x")["input_ids"] == [1, *bare_ids(shapes["own"], "x")]
    assert given("x", "x")["input_ids"] == [1, *bare_ids(shapes["own"], "x")] * 2
    assert (given.bos_token, settings_of(as_trained("own", "always"))["add_bos_token"]) == ("<s>", True)
    with pytest.raises(UserError, match="no bos_token"):
        as_trained("qwen", "always")


def test_a_tokenizer_that_ends_texts_or_begins_them_with_more_is_set_right(shapes, tmp_path: Path) -> None:
    source = Path(shutil.copytree(shapes["gpt2"], tmp_path / "both"))
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    end = backend.token_to_id(END)
    backend.post_processor = processors.TemplateProcessing(f"$A {END}", f"$A $B {END}", [(END, end)])
    backend.save(str(source / "tokenizer.json"))
    assert bos_before_documents(load_tokenizer_info(source)) is None
    write_files(trained_files(load_tokenizer(source), source, None), tmp_path / "written")
    assert load_tokenizer(tmp_path / "written")("x")["input_ids"] == bare_ids(source, "x")
    backend.post_processor = processors.TemplateProcessing(f"{END} {END} $A", f"{END} {END} $A $B", [(END, end)])
    backend.save(str(source / "tokenizer.json"))
    with pytest.raises(UserError, match=r"2 tokens before every text .* --add-bos never"):
        bos_before_documents(load_tokenizer_info(source))
    assert bos_before_documents(load_tokenizer_info(source), "never") is None


def test_the_info_from_files_and_the_loaded_tokenizer_agree_on_what_begins_texts(shapes) -> None:
    for folder in shapes.values():
        info, tokenizer = load_tokenizer_info(folder), load_tokenizer(folder)
        assert (info.first_ids, info.bos_id) == (first_ids(tokenizer, folder), tokenizer.bos_token_id)


def test_sentencepieces_model_comes_along_where_it_gives_the_same_ids(shapes, as_trained, tmp_path: Path) -> None:
    folder = as_trained("own")
    assert (folder / "tokenizer.model").read_bytes() == (shapes["own"] / "tokenizer.model").read_bytes()
    assert settings_of(folder)["add_prefix_space"] is False
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert processor.encode(PROBE) == AutoTokenizer.from_pretrained(folder)(PROBE)["input_ids"]
    for content in (b"not SentencePiece's", (shapes["own"] / "tokenizer.model").read_bytes()):
        other = Path(shutil.copytree(shapes["gpt2"], tmp_path / str(len(content))))
        (other / "tokenizer.model").write_bytes(content)
        assert "tokenizer.model" not in portable_files(load_tokenizer(other), other)


def test_sentencepieces_model_is_made_where_there_is_none(shapes, library_texts: list[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(shapes["own"], tmp_path / "bare"))
    (folder / "tokenizer.model").unlink()
    files = portable_files(load_tokenizer(folder), folder)
    made = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    own = sentencepiece.SentencePieceProcessor(model_file=str(shapes["own"] / "tokenizer.model"))
    for text in [*library_texts[1::4], PROBE, " x", "</s><s> <0x41>"]:
        assert made.encode(text) == own.encode(text)
    assert [made.is_control(number) for number in range(4)] == [False, True, True, False]
    assert (made.is_unknown(0), made.is_byte(3)) == (True, True)
    llama2 = portable_files(load_tokenizer(shapes["llama2"]), shapes["llama2"])
    assert json.loads(llama2["tokenizer_config.json"])["add_prefix_space"] is False
    of_class = sentencepiece.SentencePieceProcessor(model_proto=llama2["tokenizer.model"])
    assert of_class.encode(" x  y") == load_tokenizer(shapes["llama2"])(" x  y", add_special_tokens=False)["input_ids"]


def test_tokens_behind_sentencepieces_own_are_listed_beside_its_model(shapes, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(shapes["own"])
    tokenizer.add_tokens(["<|tool|>"])
    write_files(portable_files(tokenizer, shapes["own"]), tmp_path)
    listed = settings_of(tmp_path)["added_tokens_decoder"]
    assert {number: token["content"] for number, token in listed.items()} == {"1000": "<|tool|>"}
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 1001


@pytest.mark.skipif("TF4" not in os.environ, reason="TF4 names no folder with transformers 4 (pip install --target)")
def test_transformers_4_gives_the_same_ids(shapes, as_trained, tmp_path: Path) -> None:
    folders = {shape: as_trained(shape) for shape in SHAPES}
    program = (
        "import json, sys\nfrom transformers import AutoTokenizer, __version__\nassert __version__ < '5'\n"
        "texts = json.loads(sys.argv[1])\nloaded = [AutoTokenizer.from_pretrained(name) for name in sys.argv[2:]]\n"
        "print(json.dumps([[t(text)['input_ids'] for text in texts] + [t.bos_token] for t in loaded]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(FINDS), *map(str, folders.values())]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.environ["TF4"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = [AutoTokenizer.from_pretrained(folder) for folder in folders.values()]
    assert json.loads(done.stdout) == [[t(text)["input_ids"] for text in FINDS] + [t.bos_token] for t in loaded]
