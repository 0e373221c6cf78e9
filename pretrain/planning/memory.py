"""The memory of one rank: what its GPU and its host must hold, from the sizes of the run.

    P     elements of the weights that the rank holds before ZeRO shards them (tensor parallelism has cut them already)
    N     ranks that ZeRO shares out each weight among
    T     tokens of a micro-batch that the rank computes on

Weights, gradients, masters and moments follow from P, N, the stage and the precision. Activations are counted: the model's
own forward pass is run on fake tensors, which have sizes and no memory, and what autograd would keep of one block is added
up. Compiled blocks keep less, so there the figure is an upper bound.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from pretrain.config.schema import Config
from pretrain.engine.build_model import model_class, transformed
from pretrain.engine.loss_chunk import chunk_for
from pretrain.model.attention import choose_attention
from pretrain.model.layout import blocks_of
from pretrain.model.loss import CHUNK_LOGITS
from pretrain.planning.run_shape import RunShape

_LOGIT_BYTES = 20  # see engine/loss_chunk.py
_LIVE_WEIGHTS = 1_000_000_000  # elements that ZeRO-3 gathers at most: DeepSpeed's stage3_max_live_parameters
_PROBED_TOKENS = 64  # of the counted forward pass
_COUNTED: dict[
    tuple[str, str, torch.dtype], float
] = {}  # what blocks keep: a search asks for the same ones again and again


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by what they hold.

    Attributes:
        device: on the GPU.
        host: on the CPU, page-locked.
    """

    device: dict[str, float]
    host: dict[str, float]

    @property
    def device_bytes(self) -> float:
        return sum(self.device.values())


def memory_of(shape: RunShape, device_bytes: float | None = None) -> Memory:
    """Return the memory that one rank of a run needs.

    Args:
        shape: the run.
        device_bytes: the memory of the GPU, from which the loss chooses its chunks. None on a CPU.
    """
    states = states_of(shape)
    device = {name: size for name, size in states.device.items() if size}
    device |= {"activations": activation_bytes(shape), "loss": _loss_bytes(shape, sum(device.values()), device_bytes)}
    if buffers := _buffer_bytes(shape):
        device["gathered weights and buckets"] = buffers
    host = {name: size for name, size in states.host.items() if size}
    if shape.config.checkpoint.asynchronous:
        host["copy of a checkpoint"] = shape.checkpoint_bytes / shape.world_size
    return Memory(device, host)


def states_of(shape: RunShape) -> Memory:
    """Return the memory of weights, gradients and optimizer of one rank, by ZeRO stage."""
    stage, ranks, elements = shape.zero_stage, shape.zero_ranks, shape.elements_per_rank
    fp32 = shape.precision == "fp32"
    weights = _width(shape) * elements / (ranks if stage == 3 else 1)
    accumulated_in_fp32 = shape.ds_config["data_types"]["grad_accum_dtype"] == "fp32"
    gradients = (4 if accumulated_in_fp32 else 2) * elements / (ranks if stage >= 2 else 1)
    if stage == 1 and not fp32 and accumulated_in_fp32:
        gradients += 2 * elements  # those of autograd stay until the step
    whole = fp32 and stage == 0  # the weights are the masters
    optimizer = (8 if whole else 12) * elements / (ranks if stage >= 1 else 1)
    name = "moments" if whole else "masters and moments"
    if shape.optimizer_on_cpu:
        return Memory({"weights": weights}, {"gradients": gradients, name: optimizer})
    return Memory({"weights": weights, "gradients": gradients, name: optimizer}, {})


def activation_bytes(shape: RunShape) -> float:
    """Return the bytes that a rank keeps of the forward pass of one micro-batch for its backward pass.

    Where blocks are recomputed, these are their inputs, what `selective` keeps besides, and one block while it is at work.
    """
    config, layers, whole = shape.config, shape.model_config.num_hidden_layers, kept_bytes(shape)
    if config.activation_checkpointing == "off":
        return whole
    elements = shape.model_config.hidden_size
    if config.activation_checkpointing == "selective":
        elements += _product_outputs(shape)
    return _width(shape) * layers * shape.tokens_per_micro_batch * elements + whole / layers


def kept_bytes(shape: RunShape) -> float:
    """Return the bytes that a rank would keep of one micro-batch's blocks without recomputation."""
    dtype = torch.float32 if shape.precision == "fp32" else torch.bfloat16
    kept, cut = block_bytes_per_token(shape.config, shape.model_config, dtype), _cut_bytes_per_token(shape)
    each = kept - cut + cut / shape.config.parallel.tensor
    return shape.model_config.num_hidden_layers * shape.tokens_per_micro_batch * each


def _width(shape: RunShape) -> int:
    """Return the bytes of an element of a working copy."""
    return 4 if shape.precision == "fp32" else 2


def block_bytes_per_token(config: Config, model_config: PreTrainedConfig, dtype: torch.dtype) -> float:
    """Return the bytes that autograd keeps of one block for each token, besides the weights, without recomputation.

    Each storage counts once. The block is that of the run, as its methods have transformed it.
    """
    key = (model_config.to_json_string(), repr(config.methods), dtype)
    if key not in _COUNTED:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
                model = transformed(model_class(model_config)(model_config), config)
                torch.set_default_dtype(before)
                _COUNTED[key] = _kept_by_a_block(model) / _PROBED_TOKENS
        finally:
            torch.set_default_dtype(before)
    return _COUNTED[key]


def _kept_by_a_block(model: PreTrainedModel) -> int:
    """Return the bytes that autograd would keep of one block of a model of fake tensors.

    It is the second block where there is one, which makes nothing that later ones share. The forward pass ends after it.
    """
    choose_attention(model.train(), documents=False)
    held = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
    kept: list[torch.Tensor] = []  # alive, so that no storage takes the place of another one

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    def begin(*_: object) -> None:
        held.update({tensor.untyped_storage()._cdata: 0 for tensor in kept})

    def end(*_: object) -> None:
        raise _Counted

    block = blocks_of(model)[:2][-1]
    block.register_forward_pre_hook(begin)
    block.register_forward_hook(end)
    with suppress(_Counted), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=torch.zeros(1, _PROBED_TOKENS, dtype=torch.long), use_cache=False)
    return sum(({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in kept} | held).values())


class _Counted(Exception):
    """The block that is counted has ended."""


def _cut_bytes_per_token(shape: RunShape) -> float:
    """Return the part of a block's bytes that tensor parallelism divides: what lies between the cut matrices."""
    model = shape.model_config
    queries, keys = attention_widths(model)
    mlp = getattr(model, "intermediate_size", None) or 4 * model.hidden_size
    return _width(shape) * (2 * queries + 2 * keys + 4 * mlp) + 4 * model.num_attention_heads


def _product_outputs(shape: RunShape) -> float:
    """Return the elements for each token that `selective` keeps of a block: results of its products and of attention."""
    matrices = [w for w in shape.weights if w.in_block_matrix and w.layer == 1]
    tensor = shape.config.parallel.tensor
    whole = {"o", "down"}  # their results are summed over the tensor-parallel ranks
    outputs = sum(w.fan_out / (1 if w.role in whole else tensor) for w in matrices)
    return outputs + attention_widths(shape.model_config)[0] / tensor


def attention_widths(model: PreTrainedConfig) -> tuple[int, int]:
    """Return the width of the queries of a block and that of its keys, in elements for each token."""
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    key_heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    return head * model.num_attention_heads, head * key_heads


def _loss_bytes(shape: RunShape, states: float, device_bytes: float | None) -> float:
    """Return the bytes of the head's gradient and of a chunk of the logits."""
    model = shape.model_config
    largest = CHUNK_LOGITS if device_bytes is None else chunk_for(int(max(0.0, device_bytes - states)))
    chunk = min(largest, shape.tokens_per_micro_batch * model.vocab_size)
    return 6 * model.vocab_size * model.hidden_size + _LOGIT_BYTES * chunk


def _buffer_bytes(shape: RunShape) -> float:
    """Return the bytes of DeepSpeed's buckets, and of the weights that ZeRO-3 holds gathered at most."""
    zero, width = shape.ds_config["zero_optimization"], _width(shape)
    buckets = 0.0
    if shape.zero_stage >= 2:
        copies = 2 if zero.get("overlap_comm", True) else 1
        buckets = copies * width * min(float(zero.get("reduce_bucket_size", 5e8)), shape.elements_per_rank)
    if shape.zero_stage < 3:
        return buckets
    live = min(float(zero.get("stage3_max_live_parameters", _LIVE_WEIGHTS)), shape.elements_per_rank)
    copy = width * shape.elements_per_rank / size if (size := zero.get("zero_hpz_partition_size", 1)) > 1 else 0.0
    return buckets + width * live + copy
