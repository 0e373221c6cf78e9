"""The cases of every method of the registry, started together on real ranks."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pretrain.checkpoints.stored import master_weights
from pretrain.config.schema import Config
from pretrain.engine.build_model import _restore_rotary_tables, build_model
from pretrain.methods import REGISTRY
from pretrain.model.families import missing
from pretrain.optim.schedule import learning_rate
from pretrain.trainer.plan import Plan, make_plan, training_batches
from tests.support.corpus import Corpus
from tests.support.dense import DenseLlama, RunSettings
from tests.support.dense_families import DENSE_FAMILIES, dense_family
from tests.support.runs import run_ranks
from tests.support.workers.registry_worker import train_all

STEPS, SEQUENCES = 4, 12
LLAMA = {
    "family": "llama",
    "hidden_size": 36,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
GPT2 = {"family": "gpt2", "n_embd": 36, "n_layer": 3, "n_head": 3, "n_positions": 128}
BF16 = {"bf16": {"enabled": True}}
NOTHING_RESIDENT = {"stage3_param_persistence_threshold": 0}  # a module sees its weights in its own forward only


STAGES_BELOW_3 = (0, 1, 2)

# Defaults of the names in a reference file; see dense.py.
DEFAULTS: dict[str, Any] = {
    "OPTIONS": {},
    "EXPORTS": "LlamaForCausalLM",
    "FOLD": "bit",
    "CONTROL": "model.layers.1.mlp.down_proj.weight",
}


def reference(method: str) -> ModuleType:
    """Return the reference file of a method, with the defaults for what it leaves out."""
    module = importlib.import_module(f"tests.methods.references.{method}")
    for name, default in DEFAULTS.items():
        vars(module).setdefault(name, default)
    return module


def has_reference(method: str) -> bool:
    return importlib.util.find_spec(f"tests.methods.references.{method}") is not None


METHODS = [name for name in os.environ.get("METHODS", ",".join(sorted(REGISTRY))).split(",") if has_reference(name)]


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        methods: Names.
        label: The rest of its name.
        resident: Whether ZeRO-3 leaves small weights whole.
        resume_at: The step that a second run starts from.
        initial: Whether the initial weights are kept.
        family: One of dense_families.py. None: LLaMA.
        keys: More keys of the model section, with their values.
    """

    methods: tuple[str, ...]
    label: str
    stage: int = 3
    tensor: int = 1
    sequence: int = 1
    resident: bool = True
    tied: bool = False
    bf16: bool = False
    gpt2: bool = False
    resume_at: int | None = None
    initial: bool = False
    family: str | None = None
    keys: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return "-".join([*self.methods, self.label])

    def config(self, corpus: Corpus, out: Path, ranks: int = 2) -> dict[str, Any]:
        """Return the content of the run file, with two micro-batches a step."""
        of_family = {"family": self.family, **DENSE_FAMILIES[self.family][0]} if self.family else {}
        return {
            "name": self.name,
            "out": str(out),
            "seed": 11,
            "model": {
                **(GPT2 if self.gpt2 else LLAMA),
                **of_family,
                **dict(self.keys),
                "tie_word_embeddings": self.tied or self.gpt2,
            },
            "tokenizer": str(corpus.tokenizer),
            "data": {
                "train": str(corpus.train),
                "seq_len": 24,
                "global_batch_size": SEQUENCES,
                "micro_batch_size": SEQUENCES // (ranks // self.tensor // self.sequence) // 2,
            },
            "steps": STEPS,
            "optim": {"lr": 4e-3, "eps": 1e-6, "schedule": {"name": "cosine", "warmup_steps": 2}},
            "methods": [{"name": name, **reference(name).OPTIONS} for name in self.methods],
            "parallel": {"tensor": self.tensor, "sequence": self.sequence},
            "deepspeed": {
                "zero_optimization": {"stage": self.stage, **({} if self.resident else NOTHING_RESIDENT)},
                **(BF16 if self.bf16 else {}),
            },
            "checkpoint": {"interval_steps": self.resume_at or STEPS},
            "log": {"interval_steps": 1, "weights_interval_steps": STEPS, "activations_interval_steps": STEPS},
        }


def cases_of(method: str) -> list[Case]:
    """Return all cases of one method on two ranks."""
    alone, cls, module = (method,), REGISTRY[method], reference(method)
    resume_at = 2 if acts(method) else None  # what only sets initial values leaves nothing to resume
    cases = [
        Case(alone, "zero3", initial=True, resume_at=resume_at),
        Case(alone, "zero3_bf16", bf16=True, resident=False, resume_at=resume_at),
        *(Case(alone, f"zero{stage}", stage=stage) for stage in STAGES_BELOW_3),
    ]
    if not hasattr(module, "REFUSES_TIED"):
        cases.append(Case(alone, "zero3_tied", tied=True, resident=False, initial=True))
    if not missing("gpt2", cls.needs) and not hasattr(module, "REFUSES_TIED"):
        cases.append(Case(alone, "zero2_gpt2", stage=2, gpt2=True))
    return cases


def acts(method: str) -> bool:
    """Return whether a method does more than set initial values, rates of decay or terms of the loss."""
    return any(hook in vars(REGISTRY[method]) for hook in ("configure", "transform", "after_step"))


def is_slow(method: str, label: str) -> bool:
    """Return whether a case is left to the slow tests.

    The fast ones have ZeRO-3, and where the method acts bf16 and tensor parallelism. What another stage does to pieces of
    weights is tested without methods in tests/sharded. A tied model is fast where the method treats it in a way of its
    own.
    """
    if label in ("zero3_bf16", "cut"):
        return not acts(method)
    if label == "zero3_tied":
        return not any(name.endswith("_TIED") for name in vars(reference(method)))
    return not label.startswith("zero3")


def parameters(cases: Iterable[tuple[str, str]]) -> list[Any]:
    """Return pytest's parameters of (method, label), with the mark of those that are slow."""
    marks = {True: [pytest.mark.slow], False: []}
    return [pytest.param(method, label, marks=marks[is_slow(method, label)]) for method, label in cases]


class Runs:
    """The run folders of cases that were started together on `ranks` ranks."""

    def __init__(self, cases: list[Case], ranks: int, corpus: Corpus, folder: Path) -> None:
        self.cases = {case.name: case for case in cases}
        self.configs = {case.name: case.config(corpus, folder / "runs", ranks) for case in cases}
        self.folder = folder
        todo = {
            case.name: {"config": self.configs[case.name], "resume_at": case.resume_at, "initial": case.initial}
            for case in cases
        }
        self.ended = run_ranks([], folder / "logs", ranks, prepare=partial(train_all, todo))

    def run(self, case: str) -> Run:
        """Return the run of a case. Fail with the exception that it raised, if there was one."""
        folder = self.folder / "runs" / case
        error = Path(f"{folder}.error")
        assert not error.exists(), f"{case}: {error.read_text(encoding='utf-8')}"
        assert folder.exists(), self.ended.stderr[-5000:]
        return Run(folder, self.configs[case])


@dataclass
class Run:
    """One run folder."""

    folder: Path
    content: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"checkpoints/step_{STEPS:08d}"

    @cached_property
    def plan(self) -> Plan:
        parallel = self.content["parallel"]
        return make_plan(Config.model_validate(self.content), world_size=parallel["tensor"] * parallel["sequence"])

    @cached_property
    def initial(self) -> dict[str, torch.Tensor]:
        return torch.load(f"{self.folder}.initial.pt")

    @cached_property
    def final(self) -> dict[str, torch.Tensor]:
        """The fp32 masters after the last step."""
        return masters(self.checkpoint)

    @cached_property
    def resumed(self) -> dict[str, torch.Tensor]:
        return masters(self.folder.with_name(f"{self.folder.name}_resumed") / self.checkpoint.relative_to(self.folder))

    @cached_property
    def losses(self) -> list[dict[str, float]]:
        """The losses of each step: `cross_entropy` and the terms."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
        return [{"cross_entropy": row["loss"], **row.get("loss_terms", {})} for row in rows]

    def settings(self) -> RunSettings:
        """Return the settings that the reference repeats."""
        return settings_of(self.plan)

    def batches(self) -> list[torch.Tensor]:
        """Return the global batch of each step, (sequences, seq_len + 1)."""
        loader = training_batches(self.plan, rank=0, samples=0)
        try:
            return [torch.cat([batch.tokens for batch in loader.next_batch()]).long() for _ in range(STEPS)]
        finally:
            loader.close()


def settings_of(plan: Plan) -> RunSettings:
    """Return the settings of a run, for a reference that repeats it."""
    model, optim, steps = plan.model_config, plan.config.optim, plan.config.total_steps
    assert optim.grad_clip is not None
    return RunSettings(
        hidden=model.hidden_size,
        intermediate=model.intermediate_size,
        layers=model.num_hidden_layers,
        heads=model.num_attention_heads,
        kv_heads=model.num_key_value_heads,
        vocabulary=model.vocab_size,
        tied=model.tie_word_embeddings,
        eps=model.rms_norm_eps,
        theta=10000.0,
        std=0.02,
        lrs=tuple(learning_rate(optim, step, steps) for step in range(1, steps + 1)),
        peak_lr=optim.lr,
        betas=optim.betas,
        adam_eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip=optim.grad_clip,
        head_size=getattr(model, "head_dim", None),
    )


def masters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: load() for name, load in master_weights(checkpoint / "deepspeed").items()}


def trained_densely(
    run: Run, method: str, initial: dict[str, torch.Tensor]
) -> tuple[DenseLlama, list[dict[str, float]]]:
    """Return the reference after the run's steps, and its losses."""
    module, family = reference(method), run.content["model"]["family"]
    cls = dense_family(family, module.Reference) if family in DENSE_FAMILIES else module.Reference
    dense = cls(run.settings(), initial, module.OPTIONS)
    return dense, [dense.step(batch) for batch in run.batches()]


def trainer_model(plan: Plan, weights: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return the module that trains, unsharded, with given fp32 weights and method state, in the run's precision."""
    model = build_model(plan.config, plan.model_config, {"zero_optimization": {"stage": 0}})
    model.set_attn_implementation("sdpa")  # tests give it padding, which training does not have
    _restore_rotary_tables(model)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    if plan.precision == "bf16":
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(torch.bfloat16)
            if name.endswith("weight_scale"):
                model.get_submodule(name.removesuffix(".weight_scale")).exact_scale = weights[name]
    for method in plan.config.methods:
        method.load_state(model, state)
    return model.eval()


@torch.no_grad()
def assert_same_logits(found: torch.nn.Module, expected: torch.nn.Module, vocabulary: int, bit_equal: bool) -> None:
    """Compare two causal models on three batches: a full context, a short one, a padded one.

    The logits of the padding itself are not compared: it attends to nothing, and the classes differ in the result of that.
    """
    generator = torch.Generator().manual_seed(5)
    full, short = (torch.randint(0, vocabulary, shape, generator=generator) for shape in ((2, 128), (3, 7)))
    mask = torch.ones_like(short)
    mask[0, :3] = 0
    for batch in ({"input_ids": full}, {"input_ids": short}, {"input_ids": short, "attention_mask": mask}):
        attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        a, b = (model(**batch, use_cache=False).logits[attended] for model in (found, expected))
        difference = f"{', '.join(batch)}: largest difference {(a - b).abs().max():.2e} of {b.abs().max():.2e}"
        assert torch.equal(a, b) if bit_equal else (a - b).abs().max() <= 1e-4 * b.abs().max(), difference


@torch.no_grad()
def generated(model: Any, vocabulary: int) -> list[int]:
    """Return 64 tokens by greedy decoding, with the cache."""
    prompt = torch.randint(0, vocabulary, (1, 5), generator=torch.Generator().manual_seed(6))
    return model.generate(
        prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, use_cache=True
    )[0].tolist()
