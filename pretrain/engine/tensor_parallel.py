"""Tensor parallelism: which ranks share a batch, and which models can be cut.

`parallel.tensor: T` lets T consecutive ranks share one copy of the model. DeepSpeed's AutoTP cuts the matrices of the
decoder blocks and leaves embeddings, norms and the output head whole on each rank. The ranks of such a group read the
same batch, and so do S consecutive groups under `parallel.sequence: S` (`sequence_parallel.py`). So everything about data
counts what reads batches of its own (the data-parallel ranks) instead of ranks:

    rank = (data rank x S + slice of the sequence) x T + share of the matrices

ZeRO shares out each weight, or tensor-parallel share of one, among all ranks that have it: world size / T.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from pretrain.config.schema import Config
from pretrain.errors import UserError
from pretrain.model.families import FAMILIES
from pretrain.model.layout import Weight
from pretrain.values import nearest_divisor


def data_ranks(config: Config, world_size: int) -> int:
    """Return how many groups of ranks read different batches. Raises UserError if their size does not divide the ranks."""
    tensor, sequence = config.parallel.tensor, config.parallel.sequence
    if world_size % tensor:
        raise UserError(
            f"parallel.tensor {tensor} does not divide the {world_size} ranks that were started. "
            f"Start a multiple of {tensor} ranks, or set parallel.tensor to a divisor of {world_size}."
        )
    if world_size % (tensor * sequence):
        raise UserError(
            f"parallel.tensor {tensor} x parallel.sequence {sequence} = {tensor * sequence} does not divide the {world_size} "
            f"ranks that were started. Start a multiple of {tensor * sequence} ranks, or set parallel.sequence to "
            f"{nearest_divisor(world_size // tensor, sequence)}."
        )
    return world_size // (tensor * sequence)


def data_rank(config: Config, rank: int) -> int:
    """Return the number of the group that rank `rank` belongs to: groups are of consecutive ranks."""
    return rank // (config.parallel.tensor * config.parallel.sequence)


def zero_ranks(config: Config, world_size: int) -> int:
    """Return how many ranks ZeRO shares out each weight among. They also draw random numbers of their own."""
    return world_size // config.parallel.tensor


def zero_rank(config: Config, rank: int) -> int:
    """Return the number of rank `rank` among these."""
    return rank // config.parallel.tensor


def tensor_parallel_block(config: Config) -> dict[str, Any]:
    """Return the block of DeepSpeed's JSON for `parallel.tensor`, empty without tensor parallelism.

    By default DeepSpeed would cut a tied vocabulary, and with it the head that computes our loss.
    """
    tensor = config.parallel.tensor
    if tensor == 1:
        return {}
    return {"tensor_parallel": {"autotp_size": tensor, "vocab_parallel_lm_head": False}}


def check_model(config: Config, model_config: PreTrainedConfig) -> None:
    """Raise UserError where DeepSpeed could not give every rank of a group an equal share of each block matrix."""
    tensor = config.parallel.tensor
    if tensor == 1:
        return
    if not getattr(model_config, "base_model_tp_plan", None):
        raise UserError(
            f"parallel.tensor {tensor} cannot cut a {config.model.family}: Hugging Face has no plan for it, which says "
            "what each matrix is split along. Set parallel.tensor to 1 and let ZeRO-3 share out the weights."
        )
    if reason := FAMILIES[config.model.family].whole_heads:
        raise UserError(
            f"parallel.tensor {tensor} cannot cut a {config.model.family}: {reason}. Set parallel.tensor to 1 and let "
            "ZeRO-3 share out the weights."
        )
    for field in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (value := getattr(model_config, field)) % tensor:
            raise UserError(
                f"parallel.tensor {tensor} does not divide model.{field} {value}: the ranks of a group hold equal "
                "shares of it. Change one of the two."
            )


def elements_per_rank(weights: list[Weight], tensor: int) -> int:
    """Return the elements that one rank of a group holds before ZeRO: shares of block matrices, all other weights whole."""
    return sum(weight.numel // tensor if weight.in_block_matrix else weight.numel for weight in weights)
