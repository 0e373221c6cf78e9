"""Wrong input: every rank ends with exit code 2, rank 0 reports why in one paragraph, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml

from pretrain.data import open_shards
from pretrain.data.tokens.import_export import export_tokens
from tests.support.corpus import Corpus, make_corpus, tiny
from tests.support.runs import Ended, arguments, assert_refused, run_ranks, run_together


@dataclass
class Case:
    """The input of a user: a run file, data that a test may break, and overrides on the command line."""

    config: dict
    shards: Path
    home: Path
    overrides: dict

    def manifest(self) -> dict:
        return json.loads((self.shards / "manifest.json").read_text())

    def write_manifest(self, **changes: object) -> None:
        (self.shards / "manifest.json").write_text(json.dumps(self.manifest() | changes))

    def deepspeed(self, **keys: object) -> None:
        """Write a DeepSpeed file with these keys, and have the run file name it."""
        (self.home / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}} | keys))
        self.config["deepspeed"] = str(self.home / "ds.json")


CASES: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {}


def case(*parts: str) -> Callable:
    """Register a fault under its function's name, with the texts that the message must hold ({home} is its folder)."""

    def register(function: Callable[[Case], None]) -> Callable[[Case], None]:
        CASES[function.__name__] = (function, parts)
        return function

    return register


@case("{home}/shards/shard_00001.bin is missing", "manifest")
def missing_shard(at: Case) -> None:
    (at.shards / "shard_00001.bin").unlink()


@case("{home}/shards/shard_00001.bin", "checksum", "(on rank 1)")
def shard_with_one_bit_changed(at: Case) -> None:
    path = at.shards / "shard_00001.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


@case("{home}/shards/shard_00000.bin has", "bytes")
def shard_cut_short(at: Case) -> None:
    path = at.shards / "shard_00000.bin"
    path.write_bytes(path.read_bytes()[:-2])


@case("{home}/shards/manifest.json contradicts itself")
def manifest_that_counts_other_tokens(at: Case) -> None:
    at.write_manifest(tokens=at.manifest()["tokens"] + 1)


@case("{home}/shards/manifest.json", "schema_version 99")
def manifest_of_another_version(at: Case) -> None:
    at.write_manifest(schema_version=99)


@case("{home}/shards/manifest.json")
def manifest_that_is_not_json(at: Case) -> None:
    (at.shards / "manifest.json").write_text("{")


@case("not a folder of finished token shards", "tools/prepare_data.py")
def no_shards_at_all(at: Case) -> None:
    at.config["data"]["train"] = str(at.home / "nowhere")


@case("made with another tokenizer", "{home}/shards", "{home}/other")
def tokenizer_that_did_not_make_the_shards(at: Case) -> None:
    texts = [f"quite different words {i} about whales and sails" for i in range(50)]
    at.config["tokenizer"] = str(make_corpus(at.home / "other", texts, vocab_size=400).tokenizer)


@case("the shards in '{home}/second' were made with another tokenizer")
def two_sources_with_different_tokenizers(at: Case) -> None:
    second = Path(shutil.copytree(at.shards, at.home / "second"))
    (second / "manifest.json").write_text(json.dumps(at.manifest() | {"tokenizer_fingerprint": "0" * 32}))
    at.config["data"]["train"] = [{"path": str(at.shards)}, {"path": str(second)}]


@case("{home}/megatron/tokens.bin has the id 400 at token 11 (byte 22)", "vocabulary has 320 ids")
def ids_beyond_the_vocabulary(at: Case) -> None:
    export_tokens("megatron", open_shards(at.shards), at.home / "megatron")
    with open(at.home / "megatron/tokens.bin", "r+b") as tokens:
        tokens.seek(22)
        tokens.write((400).to_bytes(2, "little"))
    at.config["data"]["train"] = str(at.home / "megatron")


@case("shard_00001.ends says that document 1 ends at token", "The file is corrupt")
def document_ends_that_descend(at: Case) -> None:
    path = at.shards / "shard_00001.ends"
    first, second, *rest = np.fromfile(path, "<u8")
    np.array([second, first, *rest], "<u8").tofile(path)
    at.overrides |= {"data.verify": "size", "data.packing": "best_fit", "data.cache.folder": str(at.home / "cache")}


@case("there is no tokenizer at", "{home}/none", "tools/train_tokenizer.py")
def missing_tokenizer(at: Case) -> None:
    at.config["tokenizer"] = str(at.home / "none")


@case("model.vocab_size 300 is smaller than the 320 tokens of the tokenizer")
def vocabulary_larger_than_the_model(at: Case) -> None:
    at.overrides["model.vocab_size"] = 300


@case("model.max_position_embeddings 16 is smaller than data.seq_len 32")
def sequences_longer_than_the_model(at: Case) -> None:
    at.overrides["model.max_position_embeddings"] = 16


@case(
    "--set model.num_attention_heads=5: model.num_attention_heads: the 5 attention heads do not divide hidden_size 48"
)
def width_that_the_heads_do_not_share(at: Case) -> None:
    at.overrides["model.num_attention_heads"] = 5


@case("model.pad_token_id 320 is outside of the vocabulary, whose ids are 0 to 319")
def padding_outside_of_the_vocabulary(at: Case) -> None:
    at.overrides["model.pad_token_id"] = 320


@case("embed_tokens.weight would start with the standard deviation 1e-30", "model.initializer_range")
def weights_too_small_for_float32(at: Case) -> None:
    at.config["methods"] = []
    at.overrides["model.initializer_range"] = 1e-30


@case("{home}/run.yaml:", "out: $EVENKEEL_NOWHERE is not set here")
def variable_that_is_not_set(at: Case) -> None:
    at.config["out"] = "$EVENKEEL_NOWHERE/runs"
    del at.overrides["out"]


@case("data.global_batch_size 10 is not a multiple of", "2 x 2 data-parallel ranks = 4", "Set it to 8 or 12")
def global_batch_that_does_not_divide(at: Case) -> None:
    at.overrides["data.global_batch_size"] = 10


@case("{home}/shards' hold 1 samples", "fewer than the 2 data-parallel ranks")
def more_ranks_than_samples(at: Case) -> None:
    at.overrides["data.seq_len"] = max(shard["tokens"] for shard in at.manifest()["shards"]) - 1


@case("fewer than one global batch of 100000")
def fewer_samples_than_one_batch(at: Case) -> None:
    at.overrides["data.global_batch_size"] = 100_000


@case("validation shards", "data.micro_batch_size")
def too_little_validation_text(at: Case) -> None:
    at.overrides |= {"data.micro_batch_size": 200, "data.global_batch_size": 400}


@case("{home}/run.yaml:", "unknown name 'tvrr'", "did you mean 'tvr'?")
def unknown_method(at: Case) -> None:
    at.config["methods"][1]["name"] = "tvrr"


@case("methods lists tvr more than once")
def method_named_twice(at: Case) -> None:
    at.config["methods"] = [at.config["methods"][1]] * 2


@case("tvr.exclude names weights the model does not have", "model.layers.9.mlp.up_proj.weight")
def excluded_weight_that_does_not_exist(at: Case) -> None:
    at.config["methods"][1]["exclude"] = ["model.layers.9.mlp.up_proj.weight"]


@case("{home}/run.yaml:3: unknown key 'optim.weight_decai'", "did you mean 'optim.weight_decay'?")
def misspelt_key(at: Case) -> None:
    optim = at.config.pop("optim")
    at.config = {"name": "run", "optim": {"weight_decai": 0.1, **optim}, **at.config}


@case("--set optim.lrr=0.1", "unknown key 'optim.lrr'", "did you mean 'optim.lr'?")
def misspelt_override(at: Case) -> None:
    at.overrides["optim.lrr"] = 0.1


@case("either 'steps' or 'tokens'")
def both_steps_and_tokens(at: Case) -> None:
    at.config["tokens"] = 1e6


@case("either 'steps' or 'tokens'")
def neither_steps_nor_tokens(at: Case) -> None:
    del at.config["steps"]


@case("optim.lr", "greater than 0", "optim.betas", "data.seq_len")
def several_wrong_values_at_once(at: Case) -> None:
    at.config["optim"] |= {"lr": -1, "betas": "high"}
    del at.config["data"]["seq_len"]


@case("{home}/ds.json sets train_micro_batch_size_per_gpu to 4, but the run file makes it 2")
def deepspeed_file_that_fights_the_run_file(at: Case) -> None:
    at.deepspeed(train_micro_batch_size_per_gpu=4)


@case("{home}/ds.json sets gradient_clipping to 0.5, but the run file makes it 1.0")
def deepspeed_file_with_another_clipping(at: Case) -> None:
    at.deepspeed(gradient_clipping=0.5)


@case("{home}/ds.json: unknown key 'zero_optimisation'; did you mean 'zero_optimization'?")
def misspelt_key_in_the_deepspeed_file(at: Case) -> None:
    at.deepspeed(zero_optimisation={"stage": 3})


@case("{home}/ds.json", "zero_optimization.overlap_com")
def misspelt_key_inside_zero_optimization(at: Case) -> None:
    at.deepspeed(zero_optimization={"stage": 3, "overlap_com": True})


@case("{home}/ds.json", "bf16.enabeld")
def misspelt_key_inside_bf16(at: Case) -> None:
    at.deepspeed(bf16={"enabeld": True})


@case("{home}/ds.json", "zero_optimization.stage")
def zero_stage_that_does_not_exist(at: Case) -> None:
    at.deepspeed(zero_optimization={"stage": 5})


@case("{home}/ds.json has a 'optimizer' block", "'optim' section")
def deepspeed_file_with_an_optimizer(at: Case) -> None:
    at.deepspeed(optimizer={"type": "Adam"})


@case("there is no file ds_configs/zero9.json", "ds_configs/zero3_fp32.json")
def missing_deepspeed_file(at: Case) -> None:
    at.config["deepspeed"] = "ds_configs/zero9.json"


@case("{home}/ds.json has a 'tensor_parallel' block", "set parallel.tensor in the run file")
def deepspeed_file_with_tensor_parallelism(at: Case) -> None:
    at.deepspeed(tensor_parallel={"autotp_size": 2})


@case("parallel.tensor 2 does not divide model.num_key_value_heads 1")
def heads_that_tensor_parallel_ranks_cannot_share(at: Case) -> None:
    at.overrides |= {"parallel.tensor": 2, "model.num_key_value_heads": 1}


@case("parallel.tensor 3 does not divide the 2 ranks")
def tensor_parallel_ranks_that_were_not_started(at: Case) -> None:
    at.overrides["parallel.tensor"] = 3


@case("parallel.tensor 2 cannot cut a gpt2")
def model_that_tensor_parallelism_cannot_cut(at: Case) -> None:
    at.config["model"] = {"family": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}
    at.overrides["parallel.tensor"] = 2


@case("DeepSpeed cannot train in fp16 on this machine's cpu")
def precision_that_the_machine_does_not_have(at: Case) -> None:
    at.deepspeed(fp16={"enabled": True})


@case("{home}/ds.json is not valid JSON")
def deepspeed_file_that_is_not_json(at: Case) -> None:
    at.deepspeed()
    (at.home / "ds.json").write_text('{"zero_optimization": {"stage": 3,}}')


@case("{home}/run.yaml is not valid YAML", "line 2")
def run_file_that_is_not_yaml(at: Case) -> None:
    (at.home / "run.yaml").write_text("name: run\n  seed: [1\n")


@case("cannot read the run file {home}/run.yaml", "No such file")
def missing_run_file(at: Case) -> None:
    (at.home / "run.yaml").unlink()


def set_up(name: str, corpus: Corpus, home: Path) -> list[str]:
    """Return the command line of one case. Its run folder would be home/runs/run."""
    shards = Path(shutil.copytree(corpus.train, home / "shards"))
    config = json.loads(json.dumps(tiny(corpus)))
    config["data"]["train"] = str(shards)
    at = Case(config, shards, home, {"out": str(home / "runs"), "name": "run"})
    run_file = home / "run.yaml"
    run_file.write_text("")
    CASES[name][0](at)
    if run_file.exists() and not run_file.read_text():
        run_file.write_text(yaml.safe_dump(at.config, sort_keys=False))
    return arguments(run_file, at.overrides)


@pytest.fixture(scope="module")
def on_two_ranks(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """Run all cases at the same time, each on two real ranks."""
    base = tmp_path_factory.mktemp("bad_input")
    commands = {name: (set_up(name, corpus, base / name), 2) for name in CASES}
    return base, run_together(commands, base / "logs")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_every_rank_with_one_message_and_leaves_nothing(on_two_ranks: tuple, name: str) -> None:
    base, ended = on_two_ranks
    assert_refused(ended[name], *(part.format(home=base / name) for part in CASES[name][1]))
    assert ended[name].stdout == ""
    assert not (base / name / "runs").exists()


@pytest.mark.parametrize("name", ["shard_with_one_bit_changed", "vocabulary_larger_than_the_model", "misspelt_key"])
def test_a_dry_run_refuses_the_same_input(corpus: Corpus, tmp_path: Path, name: str) -> None:
    ended = run_ranks([*set_up(name, corpus, tmp_path / name), "--dry-run"], tmp_path / "logs", ranks=1)
    assert_refused(ended, CASES[name][1][0].format(home=tmp_path / name))
    assert not (tmp_path / name / "runs").exists()


def test_a_dry_run_refuses_a_folder_that_is_no_checkpoint(run_file: Path, tmp_path: Path) -> None:
    settings = {"out": str(tmp_path / "runs"), "checkpoint.resume": str(tmp_path / "nowhere")}
    ended = run_ranks(arguments(run_file, settings, "--dry-run"), tmp_path / "logs", ranks=1)
    assert_refused(ended, f"{tmp_path}/nowhere is not a complete checkpoint")
