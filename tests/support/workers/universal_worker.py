"""A rank of another trainer: a plain DeepSpeed script with a Hugging Face model, without any of our code in its engine.

It loads a universal checkpoint, or trains and saves for DeepSpeed's converter, and shows its whole state.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pretrain.distributed.ranks import initialize
from tests.support.tiny_engines import forget_garbage, leave, tokens
from tests.support.workers.elastic_worker import BEFORE, SEQUENCES, SIZES, whole_state


def plain_engine(zero_stage: int, bf16: bool, load: bool) -> Any:
    import deepspeed
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    sizes: dict[str, Any] = dict(SIZES)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "checkpoint": {"load_universal": load},
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def use(case: dict[str, Any], folder: Path, source: Path | None, rank: int) -> dict[str, int]:
    """Load `source`, or train BEFORE steps and save. Store the state on rank 0."""
    engine = plain_engine(case["stage"], case["bf16"], load=source is not None)
    if source is not None:
        engine.load_checkpoint(str(source))
    else:
        for step in range(1, BEFORE + 1):
            batch = tokens(step, SEQUENCES)[rank : rank + 1]
            engine.backward(engine(input_ids=batch, labels=batch).loss)
            engine.step()
        engine.save_checkpoint(str(folder), tag="theirs")
    whole = whole_state(engine)
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(whole, folder / "state.pt")
    return {"steps": engine.global_steps, "samples": engine.global_samples}


def use_all(cases: dict[str, tuple[dict[str, Any], Path | None]], out: Path) -> None:
    """Be a rank. Each case has a stage and precision and the checkpoint to load, None to begin; results go to `out`."""
    ranks = initialize()
    for name, (case, source) in cases.items():
        found = use(case, out / name, source, ranks.rank)
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / f"found_{ranks.rank}.json").write_text(json.dumps(found))
        forget_garbage()
    leave()
