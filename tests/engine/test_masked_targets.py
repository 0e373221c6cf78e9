"""Every target that counts has the same weight in a step, whichever rank and micro-batch it is in.

The reference holds the whole batch on one process, in one forward pass of transformers' own class.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.runs import start_ranks
from tests.support.tiny_engines import LENGTH, VOCABULARY
from tests.support.workers.masked_worker import LR, METHODS, SIZES, STEPS, batch, examine_all


def zero(stage: int, **more) -> dict:
    return {"zero_optimization": {"stage": stage}, **more}


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10}}
# Ranks to start -> the cases that they run one after another. (DeepSpeed can cut models in a process or not: never both.)
CASES = {
    "1 rank": {
        "whole": {"deepspeed": zero(1), "micro_batch_size": 8},
        "accumulated": {"deepspeed": zero(1), "micro_batch_size": 2},
    },
    "2 ranks": {
        "zero0": {"deepspeed": zero(0), "micro_batch_size": 2},
        "zero2": {"deepspeed": zero(2), "micro_batch_size": 4},
        "zero3": {"deepspeed": zero(3), "micro_batch_size": 1},
        "zero3_fp16": {"deepspeed": zero(3, **FP16), "micro_batch_size": 2},
        "zero0_fp16": {"deepspeed": zero(0, **FP16, data_types={"grad_accum_dtype": "fp16"}), "micro_batch_size": 2},
        "means_of_means": {"deepspeed": zero(2), "micro_batch_size": 2, "masked": False},
        "slices_zero0": {"deepspeed": zero(0), "micro_batch_size": 2, "sequence": 2},
        "slices_zero2_fp16": {"deepspeed": zero(2, **FP16), "micro_batch_size": 8, "sequence": 2},
        "slices_zero3": {"deepspeed": zero(3), "micro_batch_size": 4, "sequence": 2},
    },
    "2 tensor-parallel ranks": {"cut_in_two": {"deepspeed": zero(1), "micro_batch_size": 4, "tensor": 2}},
    "4 tensor-parallel ranks": {
        "cut_in_two_slices": {"deepspeed": zero(3), "micro_batch_size": 4, "tensor": 2, "sequence": 2}
    },
}
RIGHT = [(ranks, name) for ranks, cases in CASES.items() for name in cases if name != "means_of_means"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict, Path]]:
    """Return the results of each set of ranks, and the folder of its initial weights. All are started at once."""
    folders = {ranks: tmp_path_factory.mktemp("ranks") for ranks in CASES}
    with ExitStack() as stack:
        jobs = [
            stack.enter_context(
                start_ranks([], folder / "logs", int(ranks[0]), prepare=partial(examine_all, CASES[ranks], folder))
            )
            for ranks, folder in folders.items()
        ]
        for ended in [job.wait() for job in jobs]:
            assert ended.code == 0, ended.stderr[-5000:]
    return {ranks: (json.loads((folder / "found.json").read_text()), folder) for ranks, folder in folders.items()}


@pytest.fixture(scope="module")
def expected(seen) -> dict:
    """Train the same model in one process: mean losses over all targets that count, and AdamW."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **SIZES
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    start = np.load(seen["1 rank"][1] / "whole.npz")
    model.load_state_dict({name: torch.from_numpy(start[name]) for name in start})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1.0, weight_decay=0.0)
    steps = []
    for number in range(STEPS):
        losses = dense_losses(model, number)
        steps.append({name: value.item() for name, value in losses.items()})
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
    with torch.no_grad():
        return {"steps": steps, "validation": float(dense_losses(model, STEPS)["cross_entropy"])}


def dense_losses(model: LlamaForCausalLM, number: int) -> dict[str, torch.Tensor]:
    given = batch(number)
    logits = model(given.inputs, position_ids=given.positions, use_cache=False).logits[given.counted]
    parts = {
        "cross_entropy": F.cross_entropy(logits, given.tokens[:, 1:][given.counted]),
        "z_loss": METHODS[0]["coefficient"] * logits.logsumexp(-1).square().mean(),
        "mu_loss": METHODS[1]["coefficient"] * model.lm_head.weight.mean(0).square().sum(),
    }
    return {"total": sum(parts.values()), **parts}


@pytest.mark.parametrize(("ranks", "name"), RIGHT)
def test_losses_are_means_over_all_targets_of_the_global_batch(seen, expected, ranks: str, name: str) -> None:
    found, tolerance = seen[ranks][0][name], 3e-3 if "fp16" in name else 1e-5
    for step, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert step == pytest.approx(theirs, rel=tolerance)
    assert found["validation"] == pytest.approx(expected["validation"], rel=tolerance)


def test_training_went_far_enough_to_tell(expected) -> None:
    first, *_, last = (step["cross_entropy"] for step in expected["steps"])
    assert abs(last - first) > 0.1


def test_means_of_micro_batches_would_be_others(seen, expected) -> None:
    """Without weighting, the empty micro-batch alone would lower the loss by a quarter."""
    found = seen["2 ranks"][0]["means_of_means"]["steps"][0]["cross_entropy"]
    assert found != pytest.approx(expected["steps"][0]["cross_entropy"], rel=0.1)
