"""Builds the Hugging Face model, on sharded memory under ZeRO-3, without drawing a single weight.

Values come later, by position, into both copies at once (`initialize_weights`), so construction must touch no full
tensor. The initialization of torch and transformers is switched off, and ZeRO-3 partitions each weight as soon as its
module exists, without broadcasting rank 0's garbage first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pretrain.config.schema import Config
from pretrain.engine.compiler_checks import kind_of_attention
from pretrain.engine.initialize import rule_of_rows
from pretrain.errors import UserError
from pretrain.methods import RunContext
from pretrain.model.attention import choose_attention
from pretrain.model.class_logits import require_known_logits
from pretrain.model.families import FAMILIES
from pretrain.model.layout import Weight, describe, describe_model
from pretrain.model.loss import hidden_terms_of, loss_head, with_loss_head
from pretrain.optim.param_groups import peak_lr, weight_decay
from pretrain.optim.schedule import learning_rate


def hf_config(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """Return the Hugging Face configuration of the run's model, for the run's tokenizer.

    Raises:
        UserError: fields contradict each other, or the vocabulary does not fit.
    """
    given = config.model.hf_fields
    family = FAMILIES[config.model.family]
    aliases = family.config_class.attribute_map
    defaults = {
        **family.defaults(given),
        "vocab_size": len(tokenizer),
        "max_position_embeddings": config.data.seq_len,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    fields = {key: value for key, value in defaults.items() if aliases.get(key) not in given} | given
    _check_ids(given, fields["vocab_size"])
    try:
        result = family.config_class(**fields)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"the 'model' section is not a valid {config.model.family}: {reason}.") from error
    if result.vocab_size < len(tokenizer):
        remedy = f"Raise it to at least {len(tokenizer)}, or leave it out"
        if config.model.init_from is not None:
            remedy = f"It is that of {config.model.init_from.path}: take the tokenizer that this model was trained with"
        raise UserError(
            f"model.vocab_size {result.vocab_size} is smaller than the {len(tokenizer)} tokens of the tokenizer "
            f"{config.tokenizer}. {remedy}."
        )
    if result.max_position_embeddings < config.data.seq_len:
        raise UserError(
            f"model.max_position_embeddings {result.max_position_embeddings} is smaller than "
            f"data.seq_len {config.data.seq_len}."
        )
    for method in config.methods:
        result = method.configure(result)
    return result


def _check_ids(given: dict[str, Any], vocab_size: int) -> None:
    """Raise UserError for a special token of the run file outside of the vocabulary."""
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = given.get(key)
        for token_id in ids if isinstance(ids, list) else [ids]:
            if token_id is not None and token_id >= vocab_size:
                raise UserError(
                    f"model.{key} {token_id} is outside of the vocabulary, whose ids are 0 to {vocab_size - 1}. "
                    "Give one of these, or leave it out."
                )


def model_class(model_config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that is trained: the stock one of this configuration, with our loss in its head."""
    return with_loss_head(MODEL_FOR_CAUSAL_LM_MAPPING[type(model_config)])


def transformed(model: PreTrainedModel, config: Config) -> PreTrainedModel:
    """Return the model after the run's methods have transformed it and added their terms to its loss."""
    for method in config.methods:
        method.transform(model)
    model.tie_weights()
    for method in config.methods:
        loss_head(model).terms.update(method.loss_terms())
        hidden_terms_of(model).update(method.hidden_terms())
    return model


def bind_methods(config: Config, model_config: PreTrainedConfig) -> Config:
    """Return `config` with methods that are bound to the run they are part of."""

    def initial_std(weight: Weight) -> float:
        return rule_of_rows(weight, bound, model_config.initializer_range)[0].std

    def forward_factor(weight: Weight) -> float | str:
        for method in bound.methods:
            factor = method.forward_factor(weight)
            if factor is not None:
                return factor
        return 1.0

    run = RunContext(
        family=config.model.family,
        model_config=model_config,
        hidden_size=model_config.hidden_size,
        layers=model_config.num_hidden_layers,
        tied=model_config.tie_word_embeddings,
        matrices=_matrices(model_config),
        tokens_per_step=config.tokens_per_step,
        total_steps=config.total_steps,
        optimizer=config.optim.name,
        learning_rate=partial(learning_rate, config.optim, total_steps=config.total_steps),
        peak_lr=partial(peak_lr, config.optim),
        initial_std=initial_std,
        forward_factor=forward_factor,
        weight_decay=lambda weight: weight_decay(weight, config.optim.weight_decay, bound.methods),
    )
    bound = config.model_copy(update={"methods": tuple(method.bound(run) for method in config.methods)})
    return bound


def _matrices(model_config: PreTrainedConfig) -> dict[str, Weight]:
    """Return the matrices of the model before any method transforms it, by module; the head also where it is tied."""
    with torch.device("meta"), no_init_weights():
        model = model_class(model_config)(model_config)
    require_known_logits(model, loss_head(model).after_head)
    matrices = {weight.name.removesuffix(".weight"): weight for weight in describe_model(model) if weight.fan_in}
    return matrices | {"lm_head": describe("lm_head.weight", model.lm_head.weight.shape)}


def build_model(config: Config, model_config: PreTrainedConfig, ds_config: dict[str, Any]) -> PreTrainedModel:
    """Return the model with undefined values. Under ZeRO-3 each rank holds only its partition of every weight."""
    stage = ds_config["zero_optimization"].get("stage", 0)
    trained_class = model_class(model_config)
    with no_init_weights(), _partitioned(ds_config) if stage == 3 else nullcontext():
        model = transformed(trained_class(model_config), config)
    if stage == 3:
        _restore_rotary_tables(model)
    choose_attention(model, config.data.document_attention, flex=kind_of_attention(config) == "blocks")
    return model


def outline(config: Config, model_config: PreTrainedConfig) -> list[Weight]:
    """Return a description of every weight of the model without building it: no memory is used."""
    with torch.device("meta"), no_init_weights():
        model = transformed(model_class(model_config)(model_config), config)
    return describe_model(model)


def _restore_rotary_tables(model: PreTrainedModel) -> None:
    """Recompute RoPE's frequencies in float32, as exported models do: `zero.Init` builds them in bf16 in a bf16 run."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(model.config)
            for name, table in fresh.named_buffers(recurse=False):
                setattr(module, name, table.to(module.get_buffer("inv_freq").device))


def _partitioned(ds_config: dict[str, Any]) -> AbstractContextManager[object]:
    """Return DeepSpeed's `zero.Init` without the broadcast of each full weight from rank 0."""
    from deepspeed.runtime.zero.partition_parameters import Init

    class PartitionWithoutBroadcast(Init):
        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    return PartitionWithoutBroadcast(
        config_dict_or_path=ds_config, data_parallel_group=_readers_of_other_batches(ds_config)
    )


def _readers_of_other_batches(ds_config: dict[str, Any]) -> dist.ProcessGroup | None:
    """Return the ranks that share out each weight under tensor parallelism; without it None, which means all ranks.

    By default `zero.Init` shares out the weights that stay whole among all ranks, while the engine shares out the weights
    that it cuts among these ranks only. Memory and checkpoint files would have two layouts.
    """
    if "tensor_parallel" not in ds_config:
        return None
    from deepspeed.utils import groups

    groups._init_tp_mesh_device(tensor_model_parallel_size=ds_config["tensor_parallel"]["autotp_size"])
    return groups.get_data_parallel_group()
