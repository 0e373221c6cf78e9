"""The decoder blocks and the loss under torch.compile: one graph for all blocks, another for the loss.

What is compiled is the `forward` of a block, not the block. The hooks of DeepSpeed and of the monitor stay outside of the
graph. Under ZeRO-3 DeepSpeed hooks every module inside a block as well, which would cut the graph at each of them. So it
is asked to gather a block as a whole. Its gradients are then summed in the order of ZeRO-1 and 2, which differs from that
of an eager ZeRO-3 in the last bits.

Sizes are constants of a graph, and training, evaluation and the probe have one each. What a graph computes then does not
depend on which of them came first, so a resumed run repeats the losses of an uninterrupted one.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pretrain.config.schema import Config
from pretrain.engine.compiler_checks import missing_for_gpu
from pretrain.engine.recomputation import Recomputation, checkpoint_options
from pretrain.model.layout import blocks_of
from pretrain.model.loss import loss_head
from pretrain.model.norms import ScaledGain


def why_eager(config: Config) -> str | None:
    """Return why the blocks of this run are not compiled, as a clause. None if they are."""
    if config.compile == "off":
        return "compile is off"
    if config.compile is None and not torch.cuda.is_available():
        return "no GPU, and compile is not set"
    if config.compile is None and (missing := missing_for_gpu()):
        return f"this node lacks {' and '.join(missing)}"
    reasons = [f"{method.name}: {method.eager_blocks}" for method in config.methods if method.eager_blocks]
    return "; ".join(reasons) or None


def form_of_blocks(config: Config) -> str:
    """Return how the blocks of this run are executed, in a word for its record."""
    return "compiled" if why_eager(config) is None else "eager"


def gather_whole_blocks(model: PreTrainedModel) -> None:
    """Let ZeRO-3 gather and release each block as a whole. Call it before DeepSpeed makes its engine."""
    from deepspeed.utils import set_z3_leaf_module

    for block in blocks_of(model):
        set_z3_leaf_module(block, True)


def compile_blocks(model: PreTrainedModel, recomputed: Recomputation | None, device: torch.device) -> None:
    """Compile the blocks and the loss of the model of an engine.

    Args:
        model: the model. Under ZeRO-3 its blocks are gathered as a whole.
        recomputed: the part of a block that its backward pass computes again. It is decided inside of the graph, where the
            compiler sees both passes.
        device: where the model computes.
    """
    for block in blocks_of(model):
        for module in block.modules():
            if isinstance(module, ScaledGain):
                module.take_factor_as_tensor(device)
        if recomputed is not None:
            block.forward = MethodType(_RECOMPUTED[recomputed], block)
        block.forward = _compiled(block.forward)
    head = loss_head(model)
    head.sums = _compiled(head.sums)


def _compiled(function: Any) -> Any:
    # A break of the graph is an error: silently it would cost more than compiling saves.
    return torch.compile(function, fullgraph=True, dynamic=False)


def _recomputed_in_full(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(block).forward, block, *args, **checkpoint_options("full"), **kwargs)


def _recomputed_selectively(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(type(block).forward, block, *args, **checkpoint_options("selective"), **kwargs)


_RECOMPUTED = {"full": _recomputed_in_full, "selective": _recomputed_selectively}
