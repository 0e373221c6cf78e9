"""A small LLaMA in a DeepSpeed engine, and random tokens to step it with."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from pretrain.config.schema import Config
from pretrain.engine.build_model import bind_methods, build_model, hf_config
from pretrain.engine.deepspeed_config import deepspeed_config
from pretrain.engine.initialize import initialize_weights
from pretrain.optim.param_groups import build_optimizer
from pretrain.sharded import ShardedWeights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEQ_LEN = 256
STD = 0.02  # standard deviation of the weights at the start
_VOCABULARY = 4096


class _Tokenizer:
    """Stands in for a tokenizer: the model needs only its size and special ids."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return _VOCABULARY


class Llama:
    """A LLaMA in an engine. Heads are 64 wide, micro-batches at most 8 sequences a rank.

    Attributes:
        config: The run's configuration.
        engine: DeepSpeed's engine.
        weights: The engine's weights.
        tokens: The micro-batch of every step, (micro_batch_size, SEQ_LEN + 1), int64.
    """

    def __init__(
        self, hidden_size: int, layers: int, tokens: int, deepspeed_json: dict[str, Any], changes: dict | None = None
    ) -> None:
        """Build and fill the model.

        Args:
            hidden_size: Width of the model.
            layers: Number of blocks.
            tokens: Tokens of one optimizer step, a multiple of SEQ_LEN times the number of ranks.
            deepspeed_json: The content of DeepSpeed's file.
            changes: The run's `optim` keys and `methods`, where they differ from AdamW without methods.
        """
        import deepspeed

        config = _config(hidden_size, layers, tokens, deepspeed_json, changes or {})
        ds_config = deepspeed_config(config, dist.get_world_size())
        model_config = hf_config(config, cast("PreTrainedTokenizerBase", _Tokenizer()))
        self.config = bind_methods(config, model_config)
        model = build_model(self.config, model_config, ds_config)
        optimizer = build_optimizer(model, self.config)
        with redirect_stdout(StringIO()):
            self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
        self.weights = ShardedWeights(self.engine)
        self.fill()
        shape = (self.config.data.micro_batch_size, SEQ_LEN + 1)
        self.tokens = torch.randint(0, _VOCABULARY, shape, device=self.engine.device)

    def fill(self) -> None:
        """Set every weight to its first value."""
        initialize_weights(self.weights, self.config, STD)

    def settle(self) -> None:
        """Gather ZeRO-3's resident copies where its hooks have dropped them, as at the end of a step."""
        if resident := self.engine.optimizer.persistent_parameters:
            resident[0].all_gather(resident)

    def step(self, lr: float = 1e-4) -> None:
        """One optimizer step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(self.engine.gradient_accumulation_steps()):
            self.engine.backward(self.engine(self.tokens[:, :-1], self.tokens[:, 1:])["total"])
            self.engine.step()


def _config(hidden_size: int, layers: int, tokens: int, deepspeed_json: dict[str, Any], changes: dict) -> Config:
    sequences = tokens // SEQ_LEN
    share = sequences // dist.get_world_size()
    return Config.model_validate(
        {
            "name": "bench",
            "model": {
                "family": "llama",
                "hidden_size": hidden_size,
                "intermediate_size": hidden_size * 8 // 3 // 8 * 8,
                "num_hidden_layers": layers,
                "num_attention_heads": hidden_size // 64,
            },
            "tokenizer": "none",
            "data": {
                "train": "none",
                "seq_len": SEQ_LEN,
                "global_batch_size": sequences,
                "micro_batch_size": max(size for size in range(1, 9) if share % size == 0),
            },
            "steps": 1,
            "optim": {"lr": 1e-4, "weight_decay": 0.0, **changes.get("optim", {})},
            "methods": changes.get("methods", []),
            "deepspeed": deepspeed_json,
        }
    )
