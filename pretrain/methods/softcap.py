"""Logit softcapping: every logit stays between ± the cap.

    z ← c · tanh(z / c)    for the logits z of the head, in training and afterwards

Small logits hardly change, and large ones saturate at c, so that they cannot grow without bound. The loss computes this
in float32. The probabilities change too, so a model that was trained with the cap must be used with it.

The one stock class with a cap and the rest of a LLaMA is VaultGemma, which differs in two things. First, it multiplies by
1 + w where Llama multiplies by the norm's gain γ, so w = γ − 1 is stored. In 8 bits that would lose the digits of small
gains. So of a gain outside [1/2, 2] a power of two goes into the columns of the matrices that read the norm, which is
exact. Second, it multiplies the embedding by √d, so E / √d is stored. Where the head shares E, the final norm compensates
for it. √d is rounded to 8 bits where the class computes in bf16, which has no effect on the logits.

Source: Bello et al. 2016 (arXiv 1611.09940) for the tanh, and Gemma 2 (arXiv 2408.00118) for language models, whose final
cap is the default, 30.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import sqrt
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedConfig, PreTrainedModel, VaultGemmaConfig

from pretrain.errors import UserError
from pretrain.methods.base import Method
from pretrain.model.export_edits import LazyTensors, as_config, as_lazy, change, scale_final_norm
from pretrain.model.families import Need
from pretrain.model.layout import Weight
from pretrain.model.loss import loss_head

_EMBEDDING, _HEAD, _FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class Softcap(Method):
    """Logit softcapping. Folds into a VaultGemma: w = γ − 1, E ← E / √d.

    Attributes:
        cap: c.
    """

    conflicts: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "qk_norm": "no stock class has both normalized queries and keys, which Qwen3 has, and a cap, which VaultGemma has"
        }
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"llama_block"})
    fold_order: ClassVar[int] = 3

    name: Literal["softcap"] = "softcap"
    cap: float = Field(30.0, gt=0, allow_inf_nan=False)

    def transform(self, model: PreTrainedModel) -> None:
        loss_head(model).cap = self.cap

    def check(self, weights: list[Weight]) -> None:
        if any(weight.role == "bias" and ".mlp." in weight.name for weight in weights):
            raise UserError(
                "methods: softcap is exported as a VaultGemma, whose MLPs have no biases. Set model.mlp_bias to false."
            )

    def training_rule(self, weight: Weight) -> str | None:
        return f"softcap: {self.cap:g} tanh(logits / {self.cap:g})" if weight.name == self.run.head else None

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        # The configuration is Llama's, or Granite's with a factor for the embedding.
        factor = getattr(hf_config, "embedding_multiplier", 1.0) / sqrt(hf_config.hidden_size)
        change(tensors, _EMBEDDING, lambda rows: rows * factor)
        if hf_config.tie_word_embeddings:
            scale_final_norm(tensors, 1 / factor)
        for layer in range(hf_config.num_hidden_layers):
            block = f"model.layers.{layer}"
            queries = [f"{block}.self_attn.{role}_proj.weight" for role in ("q", "k", "v")]
            _move_gain(tensors, f"{block}.input_layernorm.weight", f"{block}.input_layernorm.weight", queries)
            old, new = (f"{block}.{name}_layernorm.weight" for name in ("post_attention", "pre_feedforward"))
            _move_gain(tensors, old, new, [f"{block}.mlp.{role}_proj.weight" for role in ("gate", "up")])
        _move_gain(tensors, _FINAL_NORM, _FINAL_NORM, [] if hf_config.tie_word_embeddings else [_HEAD])
        return _vault_gemma(hf_config, self.cap)

    def fold_note(self) -> str | None:
        return (
            f"the logits are capped at {self.cap:g}, which VaultGemma does; its norms hold their gains less 1 and its "
            "embedding is divided by the √d that it multiplies by"
        )


def _move_gain(tensors: LazyTensors, old: str, new: str, readers: list[str]) -> None:
    """Store the gain of a norm for a class that multiplies by 1 + its weight.

    Args:
        tensors: the exported weights, changed in place.
        old: the name of the gain.
        new: the name in VaultGemma.
        readers: the matrices that multiply the norm's output.
    """
    gain = tensors.pop(old)()
    power = _powers(gain) if readers else torch.ones_like(gain)
    for name in readers:
        change(tensors, name, partial(torch.mul, power))
    tensors.update(as_lazy({new: gain / power - 1.0}))


def _powers(gain: torch.Tensor) -> torch.Tensor:
    """Return a power of two with the gain's sign for each gain, such that `gain` divided by it is 0 or in [1/2, 2]."""
    fits = (gain == 0) | ((gain >= 0.5) & (gain <= 2.0))
    exponent = torch.frexp(gain).exponent
    return torch.where(fits, torch.ones_like(gain), torch.ldexp(gain.sign(), exponent))


def _vault_gemma(hf_config: PreTrainedConfig, cap: float) -> VaultGemmaConfig:
    """Return the same model as a VaultGemma. Its defaults are those of one of Google's models, so all fields are given."""
    return as_config(
        VaultGemmaConfig,
        hf_config,
        declared_only=True,
        hidden_activation=hf_config.hidden_act,
        query_pre_attn_scalar=hf_config.head_dim,
        layer_types=["full_attention"] * hf_config.num_hidden_layers,
        final_logit_softcapping=cap,
        attn_logit_softcapping=None,
    )
