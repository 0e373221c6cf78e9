"""Each class that the conversion writes, with tokenizers of five shapes, read by the tools that take exports.

Everything is made as users make it: trained, converted, and given to each tool in a process of its own. expected.py lists
the cells that do not work; an entry that is no longer true fails as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain.checkpoints.logit_probe import load_probe, probe_positions
from pretrain.data.json_files import read_json
from pretrain.data.prepare import prepare
from pretrain.data.text.sources import open_source
from pretrain.data.tokenizer import load_tokenizer_info
from pretrain.export.convert import convert
from tests.support.corpus import documents_of
from tests.support.peers import environments
from tests.support.peers.expected import CLASSES, CONSUMERS, TOKENIZERS, failure
from tests.support.peers.tokenizer_shapes import PRE_TOKENIZERS, SPECIAL, texts, write_tokenizer
from tests.support.runs import start_ranks
from tests.support.workers.registry_worker import train_all

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4000)]

# Heads of 32, the smallest that vLLM has on a CPU. Theta is not the default: a reader that ignores it must fail.
LLAMA = {
    "family": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
RUNS: dict[str, dict[str, Any]] = {
    "Llama": {"model": LLAMA},
    "Qwen3": {"model": LLAMA, "methods": [{"name": "qk_norm"}]},
    "GPT2": {"model": {"family": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 2}},
    "Granite": {"model": {**LLAMA, "tie_word_embeddings": True}, "methods": [{"name": "embedding_scale"}]},
    "VaultGemma": {"model": LLAMA, "methods": [{"name": "softcap", "cap": 8.0}]},
    "EvenkeelLlama": {"model": LLAMA, "methods": [{"name": "seednorm"}, {"name": "attention_residuals", "blocks": 2}]},
}
STEPS = 12
PROMPT, CONTINUATION, NEW_TOKENS = "the weight of", " layer holds", 16
TOLERANCE = 1e-4  # of logits, relative to the largest; all were within 2e-5

# llama.cpp's converter asks tokenizer_config.json about a space before the text for Llamas alone.
NO_SPACE = {"tokenizer.ggml.add_space_prefix": False}

# The script of each consumer, and the peers whose packages it needs.
ASKED: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformers 5": ("ask_transformers", ()),
    "transformers 4": ("ask_transformers", ("transformers4",)),
    "lm-eval": ("ask_lm_eval", ()),
    "llama.cpp": ("ask_llama_cpp", ("llama_cpp", "transformers4")),  # its converter's requirements name transformers 4
    "CTranslate2": ("ask_ctranslate2", ("ctranslate2",)),
    "vLLM": ("ask_vllm", ("vllm",)),
}


@dataclass(frozen=True)
class Export:
    """One cell's model.

    Attributes:
        source: The tokenizer's files before any training.
        checkpoint: The trained checkpoint.
        folder: The exported model.
    """

    source: Path
    checkpoint: Path
    folder: Path

    @property
    def probe(self) -> tuple[list[int], np.ndarray]:
        """The first sequence of the checkpoint's probe, and the trainer's logits at `probe_positions`."""
        input_ids, logits = load_probe(self.checkpoint)
        return input_ids[0].tolist(), logits[0].float().numpy()


class Matrix:
    """The exports, made on first use, and each consumer's answers."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._answers: dict[str, dict[str, Any]] = {}

    @cached_property
    def exports(self) -> dict[str, Export]:
        documents = documents_of(400)
        todo, made = {}, {}
        for tokenizer in TOKENIZERS:
            source = self.scratch / f"tokenizers/{tokenizer}"
            write_tokenizer(tokenizer, source, documents)
            shards = self._shards(tokenizer, source, documents)
            for cls, run in RUNS.items():
                name = f"{cls}-{tokenizer}"
                todo[name] = {"config": self._config(name, source, shards, run), "resume_at": None, "initial": False}
                checkpoint = self.scratch / f"runs/{name}/checkpoints/step_{STEPS:08d}"
                made[name] = Export(source, checkpoint, self.scratch / f"hf/{name}")
        with start_ranks([], self.scratch / "logs", 1, prepare=partial(train_all, todo)) as job:
            job.processes[0].join(environments.PATIENCE_S)
            ended = job.wait()
        for name, export in made.items():
            assert export.checkpoint.is_dir(), f"{name}: {ended.stderr[-3000:]}"
            convert(export.checkpoint, export.folder)
        return made

    def answers(self, consumer: str) -> dict[str, Any]:
        """Return a consumer's answers by export; it is asked once for all of them. Skip the test if it is not installed."""
        if consumer not in self._answers:
            script, peers = ASKED[consumer]
            if absent := environments.missing(peers):
                pytest.skip(
                    f"{', '.join(absent)} not installed: `make peers` installs the tools that exports are tried with"
                )
            scratch = self.scratch / consumer.replace(" ", "_")
            scratch.mkdir()
            self._answers[consumer] = environments.ask(script, peers, self._job(consumer), scratch)
        return self._answers[consumer]

    def _job(self, consumer: str) -> dict[str, Any]:
        chosen = {name: export for name, export in self.exports.items() if is_tried(consumer, *name.split("-"))}
        return {
            "folders": {name: str(export.folder) for name, export in chosen.items()},
            "own_code": {name: (export.folder / "modeling_evenkeel.py").exists() for name, export in chosen.items()},
            "input_ids": {name: export.probe[0] for name, export in chosen.items()},
            "pre_tokenizers": {name: PRE_TOKENIZERS[name.split("-")[1]] for name in chosen},
            "overrides": {"Qwen3-own": NO_SPACE},
            "texts": texts(),
            "prompt": PROMPT,
            "continuation": CONTINUATION,
            "new_tokens": NEW_TOKENS,
        }

    def _shards(self, tokenizer: str, source: Path, documents: list[str]) -> Path:
        folder = self.scratch / f"shards/{tokenizer}"
        folder.mkdir(parents=True)
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        opened = open_source([str(text)], text_field="text", subset=None, split="train")
        prepare(opened, load_tokenizer_info(source), folder / "shards", val_fraction=0, shard_tokens=50_000, workers=1)
        return folder / "shards/train"

    def _config(self, name: str, tokenizer: Path, shards: Path, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "out": str(self.scratch / "runs"),
            "seed": 5,
            "tokenizer": str(tokenizer),
            "data": {"train": str(shards), "seq_len": 64, "global_batch_size": 4, "micro_batch_size": 4},
            "steps": STEPS,
            "optim": {"lr": 1e-2, "schedule": {"name": "constant", "warmup_steps": 2}},
            "methods": [],
            "deepspeed": {"zero_optimization": {"stage": 0}},
            "checkpoint": {"interval_steps": STEPS},
            "log": {"interval_steps": STEPS, "weights_interval_steps": STEPS, "activations_interval_steps": STEPS},
            **run,
        }


def is_tried(consumer: str, cls: str, tokenizer: str) -> bool:
    """Return whether a cell is tried. vLLM takes seconds to load a model and has no tokenizer: one of each class suffices."""
    return consumer != "vLLM" or tokenizer == "own"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("matrix"))


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_cell(consumer: str, cls: str, tokenizer: str, matrix: Matrix) -> None:
    if not is_tried(consumer, cls, tokenizer):
        pytest.skip("not tried: vLLM has no tokenizer of its own")
    found = matrix.answers("transformers 5" if consumer == "pipeline" else consumer)[f"{cls}-{tokenizer}"]
    problem = found.get("error") or CHECKS[consumer](Cell(matrix, consumer, cls, tokenizer, found))
    known = failure(consumer, cls, tokenizer)
    if known is None:
        assert problem is None, problem
    else:
        assert problem is not None, f"this works: take it out of FAILURES ({known.note})"
        assert re.fullmatch(known.says, problem, re.DOTALL), problem


@dataclass(frozen=True)
class Cell:
    """A consumer's answer about an export. The methods return its faults, or None."""

    matrix: Matrix
    consumer: str
    cls: str
    tokenizer: str
    found: dict[str, Any]

    @property
    def export(self) -> Export:
        return self.matrix.exports[f"{self.cls}-{self.tokenizer}"]

    @cached_property
    def reference(self) -> dict[str, Any]:
        """The answer of transformers 5, which is itself compared with the trainer and the tokenizer's own library."""
        return self.matrix.answers("transformers 5")[f"{self.cls}-{self.tokenizer}"]

    def ids(self, expected: list[list[int] | None] | None = None) -> str | None:
        """Compare the token ids of all texts; None in `expected` for a text that is not compared."""
        pairs = zip(texts(), self.found["ids"], expected or self.reference["ids"], strict=True)
        wrong = [(text, ids, right) for text, ids, right in pairs if right is not None and ids != right]
        return f"ids of {len(wrong)} of {len(texts())} texts differ: {wrong[:5]}" if wrong else None

    def logits(self, expected: np.ndarray | None = None, positions: slice | np.ndarray = slice(None)) -> str | None:
        right = np.load(self.reference["logits"]) if expected is None else expected
        difference = (
            np.abs(np.load(self.found["logits"])[positions][:, : right.shape[1]] - right).max() / np.abs(right).max()
        )
        return None if difference <= TOLERANCE else f"logits differ by {difference:.1e} of the largest"

    def same(self, *keys: str) -> str | None:
        wrong = [key for key in keys if self.found[key] != self.reference[key]]
        return "; ".join(f"{key}: {self.found[key]!r} for {self.reference[key]!r}" for key in wrong) or None

    def log_likelihoods(self) -> dict[str, float]:
        """Return the scores that lm-eval defines, by one pass over each sequence in float64."""
        tokenizer = AutoTokenizer.from_pretrained(self.export.folder)
        model = AutoModelForCausalLM.from_pretrained(self.export.folder, dtype=torch.float64)
        plain = partial(tokenizer.encode, add_special_tokens=False)
        context = tokenizer.encode(PROMPT)
        prefix = [self.found["prefix"]]

        @torch.inference_mode()
        def score(given: list[int], scored: list[int]) -> float:
            logs = model(torch.tensor([given + scored[:-1]])).logits[0].log_softmax(-1)[-len(scored) :]
            return float(logs.gather(1, torch.tensor(scored)[:, None]).sum())

        return {
            "continuation": score(context, tokenizer.encode(PROMPT + CONTINUATION)[len(context) :]),
            "first": score(prefix, plain(PROMPT)),
            "rolling": score(prefix, plain(PROMPT + CONTINUATION)),
        }


def _all(*problems: str | None) -> str | None:
    return "; ".join(filter(None, problems)) or None


def _transformers_5(cell: Cell) -> str | None:
    source = cell.export.source
    if cell.tokenizer == "own":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        marked = tuple(token for token in SPECIAL if not token.startswith("<|"))
        raw = [None if any(token in text for token in marked) else processor.encode(text) for text in texts()]
    else:
        backend = Tokenizer.from_file(str(source / "tokenizer.json"))
        raw = [backend.encode(text).ids for text in texts()]
    _, trained = cell.export.probe
    return _all(cell.ids(raw), cell.logits(trained, probe_positions(64).numpy()))


def _transformers_4(cell: Cell) -> str | None:
    assert cell.found["version"].startswith("4.")
    return _all(cell.ids(), cell.logits(), cell.same("class", "new_ids", "pipeline"))


def _pipeline(cell: Cell) -> str | None:
    return (
        None
        if cell.found["pipeline"] == cell.found["text"]
        else f"{cell.found['pipeline']!r} for {cell.found['text']!r}"
    )


def _lm_eval(cell: Cell) -> str | None:
    state = read_json(cell.export.checkpoint / "trainer.json")
    before = load_tokenizer_info(cell.export.source).eos_id if state["bos_id"] is None else state["bos_id"]
    if cell.found["prefix"] != before:
        return f"{cell.found['prefix']} is put first, in training it was {before}"
    right = cell.log_likelihoods()
    wrong = {key: (cell.found[key], value) for key, value in right.items() if abs(cell.found[key] - value) > 1e-3}
    return f"log-likelihoods (found, expected): {wrong}" if wrong else None


def _llama_cpp(cell: Cell) -> str | None:
    whole = "\N{REPLACEMENT CHARACTER}" not in cell.reference["text"]  # consumers show half a character differently
    return _all(
        *(cell.found.get(key) for key in ("undetected", "overridden")),
        cell.ids(),
        cell.logits(),
        cell.same("new_ids", *(["text"] if whole else [])),
    )


def _ctranslate2(cell: Cell) -> str | None:
    return _all(cell.logits(), cell.same("new_ids"))


def _vllm(cell: Cell) -> str | None:
    logits = torch.from_numpy(np.load(cell.reference["logits"])).double().log_softmax(-1)
    input_ids = torch.tensor(cell.export.probe[0])
    expected = logits[:-2].gather(1, input_ids[1:-1, None])[:, 0]
    difference = float((torch.tensor(cell.found["logprobs"]) - expected).abs().max())
    return _all(cell.same("new_ids"), None if difference < 1e-3 else f"log-probabilities differ by {difference:.1e}")


CHECKS: dict[str, Callable[[Cell], str | None]] = {
    "transformers 5": _transformers_5,
    "transformers 4": _transformers_4,
    "pipeline": _pipeline,
    "lm-eval": _lm_eval,
    "llama.cpp": _llama_cpp,
    "CTranslate2": _ctranslate2,
    "vLLM": _vllm,
}
