"""Scaled embedding: the residual stream starts at about unit scale.

    x₀ = m · E[t],    m = √d, or 1/σ with σ the deviation that E is drawn with, or a number

d is the hidden size. A pre-norm block's gradient is divided by the scale of the stream, so a stream that starts at 0.02
amplifies the first blocks' gradients fifty times. At about 1 it does not. Only the input is scaled: where the head's
matrix is the embedding's, the head multiplies by E. The product is computed in float32 on the rows that are looked up,
and then cast, so the fold is exact to the bit. GPT-2's learned positions are added afterwards, unscaled.

Source: Takase et al. 2023, "Spike No More" (arXiv 2312.16903), as Scaled Embed, and Vaswani et al. 2017, section 3.4.
With 1/σ, which is √(5d/2) under Small initialization: Nishida et al. 2024 (arXiv 2410.05052), in all of their runs.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from transformers import GraniteConfig, LlamaConfig, PreTrainedConfig

from pretrain.errors import UserError
from pretrain.methods.base import EMBEDDING, Method
from pretrain.model.export_edits import LazyTensors, as_config, change, scale_final_norm
from pretrain.model.layout import Weight
from pretrain.model.reparameterization import Multiple, reparameterize
from pretrain.sharded import ShardedWeights


class EmbeddingScale(Method):
    """Scaled embedding. Folds into E ← m E. Where the head shares E, it folds into a Granite, whose class has the factor.

    Attributes:
        rule: m is √d (`sqrt_d`) or 1/σ (`inverse_std`, so that the stream starts at deviation 1).
        multiplier: m itself, instead of the rule.
    """

    decides: ClassVar[frozenset[str]] = frozenset({EMBEDDING})

    name: Literal["embedding_scale"] = "embedding_scale"
    rule: Literal["sqrt_d", "inverse_std"] = "sqrt_d"
    multiplier: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_of_the_two(self) -> EmbeddingScale:
        if self.multiplier is not None and self.rule != "sqrt_d":
            raise ValueError(f"give either multiplier or rule: {self.rule}, not both")
        return self

    def transform(self, model: torch.nn.Module) -> None:
        reparameterize(model, self.run.embedding, self._multiple)

    def check(self, weights: list[Weight]) -> None:
        std = self._initial_std
        if self.multiplier is None and (std >= 1 if self.rule == "sqrt_d" else std == 1):
            raise UserError(
                f"methods: embedding_scale, with {self.rule}, cannot be combined with an embedding that is drawn with "
                f"deviation {std:g}: it is at unit scale already, as with he_init and methods that use it. Remove "
                "embedding_scale, or give its 'multiplier'."
            )

    def why_not_from_weights(self) -> str | None:
        if self.run.tied:
            return (
                "embedding_scale multiplies the embedding and not the head, which share one matrix here, so no matrix gives "
                "both what they have in the loaded model. Set model.tie_word_embeddings to false"
            )
        if self.rule == "inverse_std":
            return (
                "embedding_scale.rule inverse_std divides by the deviation that the embedding is drawn with, and it is loaded "
                "here. Give embedding_scale.multiplier"
            )
        return None

    def take_over(self, weights: ShardedWeights) -> None:
        """Divide the embedding by m."""
        weights.rescale_({f"{self.run.embedding}.weight": (1 / self._multiple.factor, 0.0)})

    def forward_factor(self, weight: Weight) -> float | str | None:
        return self._multiple.factor if weight.role == "embed" else None

    def forward_identity(self) -> str:
        drawn = f" {self._multiple.factor!r}" if self.rule == "inverse_std" else ""
        return super().forward_identity() + drawn

    def training_rule(self, weight: Weight) -> str | None:
        where = " as input" if self.run.tied else ""
        return f"embedding_scale: times {self._multiple.factor:.4g}{where}" if weight.role == "embed" else None

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        if hf_config.tie_word_embeddings and type(hf_config) is LlamaConfig:
            return _granite(hf_config, self._multiple.factor)
        change(tensors, f"{self.run.embedding}.weight", self._multiple)
        if hf_config.tie_word_embeddings:
            scale_final_norm(tensors, 1 / self._multiple.factor)
        return hf_config

    def fold_note(self) -> str | None:
        if not self.run.tied:
            return "the embedding is multiplied by its factor"
        return (
            "the embedding's factor, which the head does not share, is Granite's embedding_multiplier; in other classes it "
            "multiplies the matrix and divides the final norm's gain"
        )

    @property
    def _multiple(self) -> Multiple:
        rule = sqrt(self.run.hidden_size) if self.rule == "sqrt_d" else 1 / self._initial_std
        return Multiple(self.multiplier or rule)

    @property
    def _initial_std(self) -> float:
        """The standard deviation that the embedding is drawn with."""
        return self.run.initial_std(self.run.matrices[self.run.embedding])


def _granite(hf_config: LlamaConfig, embedding_multiplier: float) -> GraniteConfig:
    """Return the same model as a Granite: a Llama with four factors, of which only the embedding's has an effect."""
    head_dim = hf_config.head_dim
    assert head_dim is not None  # transformers fills it in
    return as_config(
        GraniteConfig,
        hf_config,
        embedding_multiplier=embedding_multiplier,
        attention_multiplier=head_dim**-0.5,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )
