"""The token before a document in training is one decision, from preparation to lm-evaluation-harness."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.config.schema import load_config
from pretrain.errors import UserError
from pretrain.export.convert import convert
from pretrain.files import checksum
from pretrain.trainer.plan import make_plan
from pretrain.trainer.plan_summary import describe_plan
from tests.support.corpus import Corpus, documents_of, tiny
from tests.support.runs import launch, run_ranks
from tests.support.tokenizers_like import BEGIN, FINISH, write_gpt2, write_llama3, write_neox, write_qwen

TEXT = "the weight of a layer"


@dataclass(frozen=True)
class Prepared:
    """A tokenizer folder, shards made with it, and a run file for them."""

    tokenizer: Path
    shards: Path
    run_file: Path


def prepare(tokenizer: Path, out: Path, *flags: str) -> Path:
    text = out.with_suffix(".jsonl")
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents_of(120)))
    words = ["--source", str(text), "--tokenizer", str(tokenizer), "--out", str(out), "--val-fraction", "0.2", *flags]
    ended = launch([sys.executable, "tools/prepare_data.py", *words])
    assert ended.code == 0, ended.stderr
    return out


def run_file(corpus: Corpus, path: Path, **changes: object) -> Path:
    content = tiny(corpus)
    content |= {"name": path.stem, "out": str(path.parent), "steps": 2, "checkpoint": {"interval_steps": 2}}
    content["data"] |= {"global_batch_size": 2, **changes.pop("data", {})}
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = write_llama3(folder / "tokenizer", documents_of(120))
    shards = prepare(tokenizer, folder / "shards")
    file = run_file(Corpus(tokenizer, shards / "train", shards / "val"), folder / "run.yaml")
    return Prepared(tokenizer, shards, file)


@pytest.fixture(scope="module")
def checkpoint(llama3: Prepared) -> Path:
    folder = llama3.run_file.parent
    assert run_ranks(["--config", str(llama3.run_file)], folder / "logs", 1).code == 0
    return folder / "run/checkpoints/step_00000002"


def begin_id(folder: Path) -> int:
    return AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(BEGIN)


def harness(folder: Path):
    """Return lm-evaluation-harness as its users start it on an exported folder."""
    if find_spec("lm_eval") is None:
        pytest.skip("the extra 'eval' is not installed")
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
    )


def test_a_tokenizer_that_begins_texts_with_bos_gives_shards_of_such_documents(llama3: Prepared) -> None:
    manifest = json.loads((llama3.shards / "train/manifest.json").read_text())
    tokens = np.fromfile(llama3.shards / "train/shard_00000.bin", manifest["dtype"])
    starts = [0, *np.fromfile(llama3.shards / "train/shard_00000.ends", "<u8")[:-1].astype(int)]
    assert manifest["bos_id"] == begin_id(llama3.tokenizer)
    assert set(tokens[starts]) == {manifest["bos_id"]}
    assert (tokens == manifest["bos_id"]).sum() == (tokens == manifest["eos_id"]).sum() == manifest["documents"]
    shown = launch([sys.executable, "tools/inspect_data.py", "--corpus", str(llama3.shards / "train")])
    assert f"documents begin with {manifest['bos_id']}; documents end with {manifest['eos_id']}" in shown.stdout


def test_its_export_begins_texts_as_training_did(llama3: Prepared, checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "hf")
    bos = begin_id(llama3.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer(TEXT)["input_ids"] == [bos, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / file).read_text())["bos_token_id"] == bos
    model = harness(tmp_path / "hf")
    assert model.tok_encode(TEXT) == tokenizer(TEXT)["input_ids"]
    assert model.prefix_token_id == bos
    assert whole_text_score(tmp_path / "hf") == pytest.approx(likelihood(tmp_path / "hf"), rel=1e-5)


def whole_text_score(folder: Path) -> float:
    """Return the log-likelihood of `TEXT` after the token that begins documents, as tools/evaluate.py computes it."""
    from lm_eval.api.instance import Instance

    from pretrain.evaluation.lm_eval import OneBos

    model = OneBos(
        pretrained=AutoModelForCausalLM.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    return model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (TEXT,), 0)])[0]


def likelihood(folder: Path) -> float:
    """Return the same by one pass in float64 over the text with the one BOS that its tokenizer puts there."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder).double()(ids[None]).logits[0, :-1]
    return float(logits.log_softmax(-1).gather(-1, ids[1:, None]).sum())


@pytest.mark.slow
def test_checkpoints_of_older_trainers_resume_and_are_exported_as_they_were_trained(
    llama3: Prepared, checkpoint: Path, tmp_path: Path
) -> None:
    older = Path(shutil.copytree(checkpoint.parent.parent, tmp_path / "run")) / "checkpoints/step_00000002"
    state = json.loads((older / "trainer.json").read_text())
    del state["bos_id"]
    state["model"]["bos_token_id"] = 99  # what the tokenizer happened to name
    rewrite(older, "trainer.json", state)
    assert convert(older, tmp_path / "hf").model.bos_id == begin_id(llama3.tokenizer)
    overrides = ["--set", f"out={tmp_path}", "--set", "steps=3"]
    ended = run_ranks(["--config", str(llama3.run_file), *overrides], tmp_path / "logs", 1)
    assert ended.code == 0, ended.stderr
    assert json.loads((tmp_path / "run/checkpoints/step_00000003/trainer.json").read_text())["bos_id"] is not None


def test_a_model_that_ends_texts_with_several_tokens_begins_them_with_the_one_that_separates_documents(
    corpus: Corpus, checkpoint: Path, llama3: Prepared, tmp_path: Path
) -> None:
    model = {**tiny(corpus)["model"], "eos_token_id": [5, 2]}
    plan = make_plan(load_config(run_file(corpus, tmp_path / "run.yaml", model=model)), 1)
    assert (plan.model_config.eos_token_id, plan.model_config.bos_token_id) == ([5, 2], 2)

    bare = Path(shutil.copytree(checkpoint.parent.parent, tmp_path / "run")) / "checkpoints/step_00000002"
    rewrite(bare, "trainer.json", json.loads((bare / "trainer.json").read_text()) | {"bos_id": None})
    separator = AutoTokenizer.from_pretrained(llama3.tokenizer).eos_token_id
    rewrite(
        bare, "hf/config.json", json.loads((bare / "hf/config.json").read_text()) | {"eos_token_id": [5, separator]}
    )
    convert(bare, tmp_path / "hf")
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "hf" / file).read_text())
        assert (written["eos_token_id"], written["bos_token_id"]) == ([5, separator], separator)


def rewrite(checkpoint: Path, name: str, content: dict) -> None:
    """Change a file of a checkpoint and its manifest."""
    (checkpoint / name).write_text(json.dumps(content))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    entry = {"bytes": (checkpoint / name).stat().st_size, "xxh3_128": checksum(checkpoint / name)}
    manifest["files"][name] = entry
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("write", "bos"), [(None, "</s>"), (write_gpt2, "<|endoftext|>"), (write_neox, "<|endoftext|>"), (write_qwen, None)]
)
def test_other_tokenizers_put_nothing_before_a_text_and_name_no_token_that_was_not_trained(
    corpus: Corpus, tmp_path: Path, write: Callable | None, bos: str | None
) -> None:
    if write is not None:
        tokenizer = write(tmp_path / "tokenizer", documents_of(120))
        shards = prepare(tokenizer, tmp_path / "shards")
        corpus = Corpus(tokenizer, shards / "train", shards / "val")
    plan = make_plan(load_config(run_file(corpus, tmp_path / "run.yaml")), 1)
    assert plan.corpora.bos_id is None
    assert "a document is preceded by the separator of the one before" in describe_plan(plan)
    folder = tmp_path / "hf"
    for name, content in plan.tokenizer_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    AutoModelForCausalLM.from_config(plan.model_config).save_pretrained(folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), harness(folder)
    assert tokenizer.bos_token == bos
    assert plan.model_config.bos_token_id == model.prefix_token_id == tokenizer.eos_token_id
    assert model.tok_encode(TEXT) == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_shards_without_bos_train_as_ever_and_it_is_said_what_the_tokenizer_would_do(
    llama3: Prepared, tmp_path: Path
) -> None:
    bare = prepare(llama3.tokenizer, tmp_path / "bare", "--add-bos", "never")
    for split in ("train", "val"):  # as older manifests are
        manifest = json.loads((bare / split / "manifest.json").read_text())
        assert manifest.pop("bos_id") is None
        (bare / split / "manifest.json").write_text(json.dumps(manifest))
    older = Corpus(llama3.tokenizer, bare / "train", bare / "val")
    plan = make_plan(load_config(run_file(older, tmp_path / "older.yaml")), 1)
    assert f"exports put nothing before a text; the tokenizer itself would put {BEGIN} there" in describe_plan(plan)
    assert json.loads(plan.tokenizer_files["tokenizer_config.json"])["bos_token"] == FINISH
    apart = make_plan(load_config(run_file(older, tmp_path / "apart.yaml", data={"document_attention": True})), 1)
    assert "nothing precedes a document that its first token could attend to" in describe_plan(apart)


def test_corpora_that_begin_documents_differently_are_not_mixed(llama3: Prepared, tmp_path: Path) -> None:
    bare = prepare(llama3.tokenizer, tmp_path / "bare", "--add-bos", "never")
    both = [{"path": str(llama3.shards / "train")}, {"path": str(bare / "train")}]
    with_bos = Corpus(llama3.tokenizer, llama3.shards / "train", llama3.shards / "val")
    mixed = load_config(run_file(with_bos, tmp_path / "mixed.yaml", data={"train": both}))
    with pytest.raises(
        UserError, match=rf"begins with <\|begin_of_text\|> \(id \d+\), of '{bare}/train' with no token"
    ):
        make_plan(mixed, 1)
    val = load_config(run_file(with_bos, tmp_path / "val.yaml", data={"val": str(bare / "val")}))
    with pytest.raises(UserError, match="--add-bos"):
        make_plan(val, 1)


def test_a_run_file_that_names_another_bos_is_refused(llama3: Prepared, tmp_path: Path) -> None:
    corpus = Corpus(llama3.tokenizer, llama3.shards / "train", llama3.shards / "val")
    model = {**tiny(corpus)["model"], "bos_token_id": 7}
    with pytest.raises(UserError, match=r"model\.bos_token_id is 7"):
        make_plan(load_config(run_file(corpus, tmp_path / "run.yaml", model=model)), 1)
