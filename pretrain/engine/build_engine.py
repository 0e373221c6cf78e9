"""DeepSpeed's engine around the sharded model."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from transformers import PreTrainedConfig

from pretrain.config.schema import Config
from pretrain.engine.build_model import build_model
from pretrain.engine.compiled_blocks import compile_blocks, gather_whole_blocks, why_eager
from pretrain.engine.loss_chunk import agreed_chunk
from pretrain.engine.recomputation import checkpoint_options
from pretrain.engine.sequence_parallel import sequence_ranks
from pretrain.model.attention import share_sequences
from pretrain.model.loss import loss_head
from pretrain.optim.param_groups import build_optimizer
from pretrain.sharded.engine_protocol import Engine


def build_engine(config: Config, model_config: PreTrainedConfig, ds_config: dict[str, Any]) -> Engine:
    """Return the DeepSpeed engine around the sharded model. Its weights hold no values yet.

    Args:
        config: the run, with methods that `bind_methods` has bound.
        model_config: the model's configuration, from `hf_config`.
        ds_config: DeepSpeed's configuration, from `deepspeed_config`.
    """
    import deepspeed

    model = build_model(config, model_config, ds_config)
    if (ranks := sequence_ranks(config)) is not None:
        share_sequences(model, ranks, config.parallel.tensor)
        vars(model)["sequence_ranks"] = ranks
    compiled = why_eager(config) is None
    recomputed = None if config.activation_checkpointing == "off" else config.activation_checkpointing
    if compiled and ds_config["zero_optimization"].get("stage", 0) == 3:
        gather_whole_blocks(model)
    if recomputed and not compiled:
        model.gradient_checkpointing_enable(checkpoint_options(recomputed))
    optimizer = build_optimizer(model, config)
    with redirect_stdout(StringIO()):  # DeepSpeed's memory reports
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    if engine.zero_optimization_stage() == 0:
        # In half precision DeepSpeed has taken a step without gradients here, which Adam would count as its first.
        engine.optimizer.state.clear()
    loss_head(engine.module).chunk_logits = agreed_chunk(engine.device)
    if compiled:
        compile_blocks(engine.module, recomputed, engine.device)
    return engine
