"""The memory of one rank: what its GPU and its host must hold, from the sizes of the run.

    P     elements of the weights that the rank holds before ZeRO shards them (tensor parallelism has cut them already)
    N     ranks that ZeRO shares out each weight among
    T     tokens of a micro-batch that the rank computes on

Weights, gradients, masters and moments follow from P, N, the stage and the precision. Activations are counted: the model's
own forward pass is run on fake tensors, which have sizes and no memory, and what autograd would keep is added up. Compiled
blocks keep less, so there the figure is an upper bound.
"""

from __future__ import annotations

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
_COUNTED: dict[tuple[str, str, torch.dtype], Kept] = {}  # a search asks for the same ones again and again


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
    moments = shape.moment_bytes_per_rank + (4 * elements if shape.config.ema else 0)
    optimizer = (moments + (0 if whole else 4 * elements)) / (ranks if stage >= 1 else 1)
    name = ("moments" if whole else "masters and moments") + (" and average" if shape.config.ema else "")
    if shape.optimizer_on_cpu:
        return Memory({"weights": weights}, {"gradients": gradients, name: optimizer})
    return Memory({"weights": weights, "gradients": gradients, name: optimizer}, {})


def activation_bytes(shape: RunShape) -> float:
    """Return the bytes that a rank keeps of the forward pass of one micro-batch for its backward pass.

    Where blocks are recomputed, these are what all blocks keep, and the one block that is at work.
    """
    kept = kept_until_backward(shape)
    if shape.config.activation_checkpointing == "off":
        return kept
    return kept + shape.tokens_per_micro_batch * _block_bytes_per_token(shape)


def kept_until_backward(shape: RunShape) -> float:
    """Return the bytes that a rank keeps of one micro-batch from its forward to its backward pass.

    Of a recomputed block these are its input and what `selective` keeps besides.
    """
    if shape.config.activation_checkpointing == "off":
        return kept_bytes(shape)
    elements = float(shape.model_config.hidden_size)
    if shape.config.activation_checkpointing == "selective":
        elements += _product_outputs(shape)
    blocks = _width(shape) * shape.model_config.num_hidden_layers * elements
    return shape.tokens_per_micro_batch * (blocks + _counted(shape).rest)


def kept_bytes(shape: RunShape) -> float:
    """Return the bytes that a rank would keep of one micro-batch without recomputation."""
    blocks = shape.model_config.num_hidden_layers * _block_bytes_per_token(shape)
    return shape.tokens_per_micro_batch * (blocks + _counted(shape).rest)


def _block_bytes_per_token(shape: RunShape) -> float:
    """Return the bytes that a rank keeps of one block for each token, without recomputation."""
    cut = _cut_bytes_per_token(shape)
    return _counted(shape).block - cut + cut / shape.config.parallel.tensor


def _width(shape: RunShape) -> int:
    """Return the bytes of an element of a working copy."""
    return 4 if shape.precision == "fp32" else 2


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps for each token, besides the weights, without recomputation or tensor parallelism.

    Attributes:
        block: of one block.
        rest: of the embedding and the last norm.
    """

    block: float
    rest: float


def _counted(shape: RunShape) -> Kept:
    dtype = torch.float32 if shape.precision == "fp32" else torch.bfloat16
    key = (shape.model_config.to_json_string(), repr(shape.config.methods), dtype)
    if key not in _COUNTED:
        _COUNTED[key] = count_kept(shape.config, shape.model_config, dtype)
    return _COUNTED[key]


def count_kept(config: Config, model_config: PreTrainedConfig, dtype: torch.dtype) -> Kept:
    """Return what autograd would keep of the model of a run, as its methods have transformed it, from fake tensors.

    Each storage counts once, for the part of the model that keeps it first.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), no_init_weights():
            model = transformed(model_class(model_config)(model_config), config)
            torch.set_default_dtype(before)
            return _kept_by_parts(model)
    finally:
        torch.set_default_dtype(before)


def _kept_by_parts(model: PreTrainedModel) -> Kept:
    """Count a forward pass of a model of fake tensors.

    The block that stands for all is the second one, where there are two: it makes nothing that later ones share.
    """
    choose_attention(model.train(), documents=False)
    sizes = {parameter.untyped_storage()._cdata: 0 for parameter in model.parameters()}
    alive: list[torch.Tensor] = []  # so that no storage takes the place of another one
    counts: list[int] = []  # before and after the block

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        sizes.setdefault(tensor.untyped_storage()._cdata, tensor.untyped_storage().nbytes())
        return tensor

    def count(*_: object) -> None:
        counts.append(sum(sizes.values()))

    blocks = blocks_of(model)
    block = blocks[:2][-1]
    block.register_forward_pre_hook(count)
    block.register_forward_hook(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(input_ids=torch.zeros(1, _PROBED_TOKENS, dtype=torch.long), use_cache=False)
    keep(output.last_hidden_state)  # for the gradient of the head
    each = counts[1] - counts[0]
    return Kept(each / _PROBED_TOKENS, (sum(sizes.values()) - len(blocks) * each) / _PROBED_TOKENS)


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
