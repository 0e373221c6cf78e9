"""A step that is left out leaves no trace. A step that is clipped is the dense step on the shortened gradient.

On real ranks, in every way that DeepSpeed has to take a step. The ranks are started once and go through every case
(gate_worker.py).
"""

from __future__ import annotations

import json
from functools import partial
from math import sqrt

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.runs import start_ranks
from tests.support.selection import slow_but
from tests.support.tiny_engines import LENGTH, VOCABULARY, tokens
from tests.support.workers.gate_worker import ADAMW, EVERYWHERE, HARM, SIZES, examine_all
from tests.support.workers.muon_worker import SEQUENCES

# The first step of all is harmed too: DeepSpeed prepares things at the first one that it takes.
DAYS = ["NaN gradient", "good", "infinite gradient", *["good"] * 3, "gradient spike", "NaN loss", "loss spike", "good"]
KINDS = {day: "spike" if "spike" in day else "not finite" for day in HARM}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def zero(stage: int, precision: str = "fp32", **more) -> dict:
    """Return a case of this stage. Without ZeRO DeepSpeed can only accumulate gradients in the precision of the weights."""
    found: dict = {"zero_optimization": {"stage": stage, **more}}
    if precision != "fp32":
        found[precision] = {"enabled": True, **({"loss_scale": 64} if precision == "fp16" else {})}
        found |= {} if stage else {"data_types": {"grad_accum_dtype": precision}}
    return {"deepspeed": found, "days": DAYS}


def muon(stage: int, precision: str = "fp32", **more) -> dict:
    case = zero(stage, precision, **more) | {"optim": {"name": "muon", "grad_clip": None}}
    if (
        stage in (1, 2) and precision == "fp32" and not more
    ):  # no norm of gradients: see `pretrain.engine.gradient_norm`
        case["days"] = [day for day in DAYS if day != "gradient spike"]
    return case


SPARED = {
    **{
        f"zero{stage}_{precision}": zero(stage, precision)
        for stage in range(4)
        for precision in ("fp32", "bf16", "fp16")
    },
    "zero0_unclipped": {**zero(0), "optim": {"grad_clip": None}},
    "zero2_bf16_checked": zero(2, "bf16"),
    "zero2_bf16_offloaded": zero(2, "bf16", **OFFLOAD),
    "zero1_fp32_offloaded": zero(1, **OFFLOAD),
    "zero3_bf16_offloaded": zero(3, "bf16", sub_group_size=2000, **OFFLOAD),
    "zero3_fp32_sub_groups": zero(3, sub_group_size=2000),
    "zero3_fp32_nothing_resident": zero(3, stage3_param_persistence_threshold=0),
    **{f"muon_zero{stage}": muon(stage) for stage in range(4)},
    "muon_zero1_bf16": muon(1, "bf16"),
    "muon_zero3_bf16": muon(3, "bf16"),
    "muon_zero2_offloaded": muon(2, **OFFLOAD),
    "muon_zero3_offloaded": muon(3, **OFFLOAD),
}
SPARED["zero2_bf16_checked"]["deepspeed"]["bf16"]["check_grad_overflow"] = True
TENSOR = {f"tensor_zero{stage}": {**zero(stage), "tensor": 2} for stage in (0, 1, 3)}

TAKEN = {"reported": {**zero(2), "guard": {"spikes": "report"}}}

WARMUP, Z_THRESHOLD, ALPHA = 4, 2.0, 0.9
ZCLIP = {"zclip": {"warmup_steps": WARMUP, "z_threshold": Z_THRESHOLD, "alpha": ALPHA}}
CLIPPED_DAYS = [*["good"] * 6, "everywhere", "good", "everywhere", "good"]
CLIPPED = {
    f"zclip_zero{stage}_{clip}": {
        **zero(stage, **({"sub_group_size": 2000} if stage == 3 else {})),
        "optim": {**ZCLIP, "grad_clip": clip},
        "days": CLIPPED_DAYS,
        "guard": {"spikes": "report"},
        "tables": True,
    }
    for stage, clip in ((0, None), (0, 2.0), (1, 2.0), (2, None), (3, None), (3, 2.0))
}

SEARCHING = {
    f"searching_zero{stage}": {**zero(stage, "fp16"), "days": [*["infinite gradient"] * 4, "good"]}
    for stage in range(4)
}
for case in SEARCHING.values():
    case["deepspeed"]["fp16"] = {"enabled": True, "initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}

# The other stages run the same code, or other paths of DeepSpeed.
FAST = ("zero0_fp32", "zero1_bf16", "zero2_bf16", "zero3_fp32", "zero3_bf16_offloaded", "muon_zero3")
FAST += ("zclip_zero0_2.0", "zclip_zero3_None", "searching_zero3", "reported")
ALL = SPARED | TAKEN | CLIPPED | SEARCHING | TENSOR


def job_of(case: str) -> object:
    """Return what the cases of one set of ranks have in common. (A process can cut models or not: never both.)"""
    stage = ALL[case]["deepspeed"]["zero_optimization"]["stage"]
    return "fast" if case in FAST else (case in TENSOR, "muon" in case, case in TENSOR or stage)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory):
    """Return the results of a case, and its weights as `tables` if it has any. Starts the ranks at the first call."""
    found: dict[str, dict] = {}

    def at(case: str) -> dict:
        if case not in found:
            cases = {name: other for name, other in ALL.items() if job_of(name) == job_of(case)}
            out = tmp_path_factory.mktemp("ranks")
            with start_ranks([], out / "logs", 2, prepare=partial(examine_all, cases, out)) as job:
                ended = job.wait()
            assert ended.code == 0, ended.stderr[-5000:]
            found.update(json.loads((out / "found.json").read_text()))
            for tables in out.glob("*.npz"):
                found[tables.stem]["tables"] = dict(np.load(tables))
        return found[case]

    return at


@pytest.mark.parametrize("case", slow_but(FAST, SPARED | TENSOR))
def test_a_run_with_harmed_steps_is_bit_for_bit_the_run_without_them(seen, case: str) -> None:
    days = (SPARED | TENSOR)[case]["days"]
    found = seen(case)
    assert [told["kind"] for told in found["days"]] == [KINDS.get(day, "fine") for day in days]
    assert [told["skipped"] for told in found["days"]] == [day != "good" for day in days]
    assert found["held"] == found["held_without"]


def test_a_spike_that_is_only_reported_changes_the_run(seen) -> None:
    found = seen("reported")
    assert [told["kind"] for told in found["days"]] == [KINDS.get(day, "fine") for day in DAYS]
    assert [told["skipped"] for told in found["days"]] == [KINDS.get(day) == "not finite" for day in DAYS]
    assert found["held"] != found["held_without"]


@pytest.mark.parametrize("case", slow_but(FAST, SEARCHING))
def test_overflows_of_fp16_count_only_once_the_loss_scale_cannot_fall(seen, case: str) -> None:
    days = seen(case)["days"]
    assert [told["kind"] for told in days] == ["overflow", "overflow", "not finite", "not finite", "fine"]
    assert [told["loss_scale"] for told in days] == [4, 2, 1, 1, 1]
    assert [told["streak"] for told in days] == [0, 0, 1, 2, 0]
    assert [told["skipped"] for told in days] == [True] * 4 + [False]


@pytest.mark.parametrize("case", slow_but(FAST, CLIPPED))
def test_a_step_clipped_by_zclip_is_the_dense_step_with_the_gradient_so_much_shorter(seen, case: str) -> None:
    tables, days = seen(case)["tables"], seen(case)["days"]
    start, end = (
        {key.removeprefix(f"{when}/"): w for key, w in tables.items() if key.startswith(when)}
        for when in ("start", "end")
    )
    expected, norms, factors = dense_training(start, CLIPPED[case]["optim"]["grad_clip"])
    assert [told["norm"] for told in days] == pytest.approx(norms, rel=1e-5)
    assert [told["factor"] for told in days] == pytest.approx(factors, rel=1e-4)
    assert any(factor < 1 for factor in factors), "nothing was clipped: the test would show nothing"
    for name, w in expected.items():
        error = np.linalg.norm(end[name] - w) / np.linalg.norm(w - start[name])
        assert error < 5e-5, f"{name} is off by {error:.1e} of its way"


def dense_training(start: dict[str, np.ndarray], grad_clip: float | None):
    """Train the same days in one process: AdamW, and ZClip written out from the paper's algorithm 1.

    Returns the weights, the norms before clipping, and the factors by which ZClip shortened what `grad_clip` had left.
    """
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, bos_token_id=1, eos_token_id=2, **SIZES)
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(w) for name, w in start.items()})
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAMW, betas=(0.9, 0.95))
    norms, factors, seen, good = [], [], [], 0
    mean = variance = 0.0
    for day in CLIPPED_DAYS:
        good += day == "good"
        whole = tokens(good, SEQUENCES)
        logits = model(whole[:, :-1], use_cache=False).logits
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole[:, 1:].flatten()).backward()
        gradients = [p.grad.mul_(EVERYWHERE if day == "everywhere" else 1.0) for p in model.parameters()]
        norm = sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        if len(seen) < WARMUP:
            seen.append(norm)
            allowed = norm
            mean, variance = np.mean(seen), np.var(seen)
        else:
            z = (norm - mean) / sqrt(variance)
            allowed = mean + Z_THRESHOLD**2 / z * sqrt(variance) if z > Z_THRESHOLD else norm
            mean = ALPHA * mean + (1 - ALPHA) * allowed
            variance = ALPHA * variance + (1 - ALPHA) * (allowed - mean) ** 2
        clipped = norm if grad_clip is None else min(norm, grad_clip)
        norms.append(norm)
        factors.append(min(1.0, allowed / clipped))
        for gradient in gradients:
            gradient.mul_(min(clipped, allowed) / norm)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}, norms, factors
