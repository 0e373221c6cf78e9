"""The runs that are repeated on the fake device, by name."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.methods import REGISTRY
from tests.fakecuda.build import REPOSITORY
from tests.support.corpus import Corpus, tiny
from tests.support.method_suite import reference
from tests.support.stock_models import saved

STEPS, RESUME_AT, BATCH_SIZE = 3, 2, 4

BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True, "initial_scale_power": 4}}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": BF16, "fp16": FP16}
CPU = {"device": "cpu", "pin_memory": True}
OFFLOAD = {"offload_optimizer": CPU}
NOTHING_RESIDENT = {"stage3_param_persistence_threshold": 0}
MUON = {"optim.name": "muon", "optim.grad_clip": None}

TVR = {"name": "tvr", "target_std": 0.01, "interval_steps": 2, "ratio_threshold": 1.1}

STATEFUL = ("sigma_reparam",)  # methods with state of their own in a checkpoint


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        settings: Keys of the run file, with dots, over those of `content`.
        ranks: The numbers of ranks on which it is run.
        slow: Those of them that only the slow tests run.
        starts: Whether it starts from a saved model instead of drawn weights.
        resumes: Whether a second run starts from its checkpoint of step RESUME_AT.
        plant: The name of a fault in faults.py that is planted first.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    ranks: tuple[int, ...] = (1, 2)
    slow: tuple[int, ...] = (2,)
    starts: bool = False
    resumes: bool = False
    plant: str | None = None

    @property
    def steps(self) -> int:
        """Return how many steps the run has."""
        return self.settings.get("steps", STEPS)

    def content(self, name: str, corpus: Corpus, out: Path) -> dict[str, Any]:
        """Return the content of the run file."""
        content = deepcopy(tiny(corpus)) | {
            "name": name,
            "out": str(out),
            "steps": self.steps,
            "methods": [{"name": "lir", "initializer_range": 0.02}, TVR],
            "deepspeed": "ds_configs/zero3_bf16.json",
            "checkpoint": {"interval_steps": RESUME_AT},
            "eval": {"interval_steps": 2, "batches": 1},
            "log": {"interval_steps": 1, "weights_interval_steps": 2, "activations_interval_steps": 2},
        }
        content["data"]["global_batch_size"] = BATCH_SIZE
        for key, value in self.settings.items():
            *sections, last = key.split(".")
            section = content
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = value
        if self.starts:
            content["model"] = {"family": "llama", "init_from": str(_model(out / f"{name}-source"))}
        return content


def _model(folder: Path) -> Path:
    """Save a model with the vocabulary of the corpus, and return its folder."""
    return saved(folder, "llama", vocab_size=320, max_position_embeddings=64, attention_bias=False, mlp_bias=False)


def zero(stage: int, precision: str = "bf16", /, **more: Any) -> dict[str, Any]:
    """Return a `deepspeed` section. Without ZeRO DeepSpeed can only accumulate in the precision of the weights."""
    accumulate = {"data_types": {"grad_accum_dtype": precision}} if stage == 0 else {}
    return {**PRECISIONS[precision], **accumulate, "zero_optimization": {"stage": stage, **more}}


def _files() -> dict[str, Case]:
    """Return a case of each file of ds_configs/."""
    files = sorted((REPOSITORY / "ds_configs").glob("*.json"))
    return {
        f"file-{path.stem}": Case({"deepspeed": f"ds_configs/{path.name}"}, slow=(), resumes=True) for path in files
    }


def _engines() -> dict[str, Case]:
    """Return the cases of DeepSpeed's stages, precisions and offloading."""
    cases = {
        f"zero{stage}-{precision}": Case(
            {"deepspeed": zero(stage, precision)}, slow=() if precision == "fp32" else (2,)
        )
        for stage in range(4)
        for precision in PRECISIONS
    }
    cases |= {f"zero{stage}-offload": Case({"deepspeed": zero(stage, **OFFLOAD)}) for stage in (1, 2)}
    cases["zero3-offload-fp32"] = Case({"deepspeed": zero(3, "fp32", **OFFLOAD)})
    cases["zero3-offload-all"] = Case(
        {"deepspeed": zero(3, **OFFLOAD, offload_param=CPU, **NOTHING_RESIDENT)}, slow=(), resumes=True
    )
    cases["zero3-nothing-resident"] = Case({"deepspeed": zero(3, **NOTHING_RESIDENT)}, resumes=True)
    cases["zero3-copy-within-nodes"] = Case(
        {"deepspeed": zero(3, zero_hpz_partition_size=2, **NOTHING_RESIDENT)}, ranks=(2,), slow=()
    )
    return cases


def _methods() -> dict[str, Case]:
    """Return a case of each registered method, and of some on other engines."""
    cases = {
        f"method-{name}": Case(
            {
                "methods": [{"name": name, **reference(name).OPTIONS}],
                "deepspeed": zero(3, **NOTHING_RESIDENT),
                "model.num_hidden_layers": 3,
            },
            resumes=name in STATEFUL,
        )
        for name in REGISTRY
    }
    offloaded = {"deepspeed": zero(3, **OFFLOAD)}
    wesar = {"name": "wesar", **reference("wesar").OPTIONS}
    every_step = {"name": "tvr", "target_std": 0.01, "interval_steps": 1}
    cases["wesar-zero1"] = Case({"methods": [wesar], "deepspeed": zero(1)}, slow=())
    cases["wesar-offload"] = Case({"methods": [wesar], **offloaded})
    cases["mu_centering-offload"] = Case({"methods": [{"name": "mu_centering"}], **offloaded})
    cases["tvr-gathered"] = Case({"methods": [{**every_step, "engine": "gathered"}]}, slow=())
    return cases


def _parts() -> dict[str, Case]:
    """Return the cases of what a run does besides: optimizers, data, checkpoints, rollback, tensor parallelism."""
    packed = {"data.packing": "best_fit", "data.document_attention": True}
    bad_steps = {"resilience.guard": {"max_skips": 2}, "resilience.autopsy_steps": 3, "steps": 8}
    gpt2 = {"family": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4}
    cut = {"parallel.tensor": 2}
    return {
        "muon-zero3": Case(MUON, slow=()),
        "lion-zero3": Case({"optim.name": "lion"}, slow=()),
        "muon-zero1": Case({**MUON, "deepspeed": zero(1)}),
        "muon-offload": Case({**MUON, "deepspeed": zero(3, **OFFLOAD)}),
        "documents": Case(packed, slow=()),
        "documents-zero1": Case({**packed, "deepspeed": zero(1)}),
        "recomputed": Case({"activation_checkpointing": True}, slow=()),
        "recomputed-zero1-wesar": Case(
            {
                "activation_checkpointing": True,
                "deepspeed": zero(1),
                "methods": [{"name": "wesar", **reference("wesar").OPTIONS}],
            }
        ),
        "asynchronous": Case({"checkpoint.asynchronous": True}, slow=(), resumes=True),
        "asynchronous-zero1": Case({"checkpoint.asynchronous": True, "deepspeed": zero(1)}, resumes=True),
        "zclip": Case({"optim.zclip": {"warmup_steps": 2}}),
        "rollback": Case(bad_steps, slow=(), plant="two_bad_steps"),
        "gpt2": Case({"model": gpt2, "deepspeed": zero(3, "fp32")}),
        # Without dropout, which a CPU does in other steps than a GPU: in bf16 they round differently.
        "gpt2-bf16": Case({"model": gpt2 | dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)}),
        "tensor-zero1": Case({**cut, "deepspeed": zero(1)}, ranks=(2,), slow=(), resumes=True),
        "tensor-zero3": Case(cut, ranks=(2,), slow=(), resumes=True),
        "tensor-zero2-offload": Case({**cut, "deepspeed": zero(2, **OFFLOAD)}, ranks=(2,)),
    }


def _starts() -> dict[str, Case]:
    """Return cases that start from a saved model."""
    bare = {"deepspeed": zero(3, **NOTHING_RESIDENT)}
    shrunk = {"methods": [{"name": "wesar"}], "warm_start": {"shrink": 0.9, "noise": 0.01}}
    return {
        "start-wesar-shrunk": Case({**shrunk, **bare}, starts=True, slow=()),
        "start-weight_norm": Case({"methods": [{"name": "weight_norm"}], "deepspeed": zero(1)}, starts=True),
        "start-sigma_reparam": Case({"methods": [{"name": "sigma_reparam"}], **bare}, starts=True),
        "start-offload": Case({"methods": [{"name": "weight_norm"}], "deepspeed": zero(3, **OFFLOAD)}, starts=True),
    }


CASES = _files() | _engines() | _methods() | _parts() | _starts()
