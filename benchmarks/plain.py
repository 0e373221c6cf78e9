"""The yardstick of the trainer: the same model in a plain PyTorch loop, one process. Started by benchmarks/trainer.py.

    python -m benchmarks.plain CONFIG STEPS

Stock Hugging Face model, torch AdamW, full logits, global-norm clipping; batches as large as the trainer's micro-batch
and accumulated to its global batch, on random tokens. Prints the median tokens per second.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from pretrain.config.schema import load_config
from pretrain.data import load_tokenizer


def main() -> None:
    config, steps = load_config(sys.argv[1]), int(sys.argv[2])
    data = config.data
    vocab_size = len(load_tokenizer(config.tokenizer))
    fields = {"vocab_size": vocab_size, "max_position_embeddings": data.seq_len, **config.model.hf_fields}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.model.family, **fields)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, weight_decay=config.optim.weight_decay)
    accumulation = data.global_batch_size // data.micro_batch_size
    seconds = []
    for _ in range(steps):
        began = time.perf_counter()
        for _ in range(accumulation):
            tokens = torch.randint(0, vocab_size, (data.micro_batch_size, data.seq_len + 1), device=device)
            logits = model(tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    print(config.tokens_per_step / statistics.median(seconds[steps // 3 :]))


if __name__ == "__main__":
    main()
