"""A rank that builds models with a padding token, trains them, and writes down their weights, case by case."""

from pathlib import Path

import numpy as np
import torch

from pretrain.config.schema import Config
from pretrain.data.batches.batch import MicroBatch
from pretrain.distributed.ranks import Ranks, initialize
from pretrain.engine.initialize import initialize_weights
from pretrain.engine.step import train_step
from pretrain.sharded import ShardedWeights
from tests.support.arrays import save_arrays
from tests.support.tiny_engines import VOCABULARY, forget_garbage, gated, leave, share, tiny_config, tiny_plan, tokens
from tests.support.workers.muon_worker import masters

SEQUENCES, STEPS, LR, STD = 4, 2, 1e-2, 0.02
PADDING = VOCABULARY // 2  # the middle one of an odd number of rows: two ranks share its elements
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def run_config(case: dict) -> Config:
    """Return the run of a case: {stage, gpt2, tied, methods, padding}."""
    llama = {**LLAMA, "tie_word_embeddings": case.get("tied", False)}
    padding = {"pad_token_id": PADDING if case.get("padding", True) else None}
    return tiny_config(
        {"deepspeed": {"zero_optimization": {"stage": case["stage"]}}},
        model={**({"family": "gpt2", **GPT2} if case.get("gpt2") else llama), **padding},
        sequences=SEQUENCES,
        micro_batch_size=SEQUENCES // 2,
        steps=STEPS,
        optim={"lr": LR, "eps": 1e-6, "weight_decay": 0.1, "grad_clip": None, "schedule": {"name": "constant"}},
        methods=case.get("methods", []),
    )


def batch(number: int) -> torch.Tensor:
    """Return the tokens of step `number`, the padding token among them."""
    whole = tokens(number, SEQUENCES)
    whole[:, number] = PADDING
    return whole


def examine(case: dict, ranks: Ranks) -> dict[str, np.ndarray]:
    """Return every weight before and after training."""
    plan = tiny_plan(run_config(case))
    gate = gated(plan)
    initialize_weights(ShardedWeights(gate.engine), plan.config, STD)
    tables = {f"start/{name}": w for name, w in masters(gate.engine).items()}
    for number in range(1, STEPS + 1):
        train_step(gate, number, share(MicroBatch(batch(number)), plan.config, ranks), LR, ranks, masked=False)
    return tables | {f"end/{name}": w for name, w in masters(gate.engine).items()}


def examine_all(cases: dict[str, dict], out: Path) -> None:
    """Be a rank: the weights of each case go to the folder `out`."""
    ranks = initialize()
    for name, case in cases.items():
        forget_garbage()
        tables = examine(case, ranks)
        if ranks.is_first:
            save_arrays(out / f"{name}.npz", tables)
    leave()
