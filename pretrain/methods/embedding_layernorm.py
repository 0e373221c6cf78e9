"""Embedding LayerNorm: the residual stream starts normalized.

    x₀ = LayerNorm(E[t])    with a gain and a bias of the hidden size, eps 1e-5

Its scale is 1 whatever the embedding's is, as long as the gain stays near 1: see `embedding_scale` for why. It is
computed in float32 on the rows that are looked up, and then cast. A token's row always gives the same x₀, which the fold
stores. GPT-2's learned positions are added afterwards.

Source: Le Scao et al. 2022 (arXiv 2210.15424) and BLOOM. Takase et al. 2023, "Spike No More" (arXiv 2312.16903), call it
Embed LN. It has no options.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from pretrain.methods.base import EMBEDDING, Method
from pretrain.model.export_edits import LazyTensors, change
from pretrain.model.layout import Weight, embedding_of

EPS = 1e-5


class NormalizedEmbedding(nn.Embedding):
    """`nn.Embedding` whose rows are normalized when they are looked up.

    The gain and the bias are its own, because under ZeRO-3 a module has whole weights only in its own forward.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.norm_weight = nn.Parameter(torch.empty(embedding_dim))
        self.norm_bias = nn.Parameter(torch.empty(embedding_dim))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return normalized(super().forward(ids), self.norm_weight, self.norm_bias)


def normalized(rows: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Return the LayerNorm of (..., hidden_size) rows, computed in float32 and cast to the precision of `rows`."""
    return F.layer_norm(rows.float(), gain.shape, gain.float(), bias.float(), EPS).to(rows.dtype)


class EmbeddingLayerNorm(Method):
    """Embedding LayerNorm. Folds into E ← LayerNorm(E). A head that shares E keeps the raw one, and the export is untied."""

    decides: ClassVar[frozenset[str]] = frozenset({EMBEDDING})
    fold_order: ClassVar[int] = 0

    name: Literal["embedding_layernorm"] = "embedding_layernorm"

    def transform(self, model: nn.Module) -> None:
        old = embedding_of(model, self.run.embedding)
        new = NormalizedEmbedding(old.num_embeddings, old.embedding_dim, old.padding_idx)
        model.set_submodule(self.run.embedding, new)

    def training_rule(self, weight: Weight) -> str | None:
        own = {f"{self.run.embedding}.norm_weight": "gain", f"{self.run.embedding}.norm_bias": "bias"}
        if weight.name in own:
            return f"embedding_layernorm: {own[weight.name]} of its LayerNorm"
        where = " as input" if self.run.tied else ""
        return f"embedding_layernorm: rows normalized{where}" if weight.role == "embed" else None

    def fold(self, tensors: LazyTensors, hf_config: PreTrainedConfig) -> PreTrainedConfig:
        embedding = self.run.embedding
        gain, bias = (tensors.pop(f"{embedding}.norm_{kind}")() for kind in ("weight", "bias"))
        if self.run.tied:
            tensors["lm_head.weight"] = tensors[f"{embedding}.weight"]
            hf_config.tie_word_embeddings = False
        change(tensors, f"{embedding}.weight", lambda rows: normalized(rows, gain, bias))
        return hf_config

    def fold_note(self) -> str | None:
        untied = "; the head keeps the raw matrix, so the two are no longer tied" if self.run.tied else ""
        return f"the embedding's rows are stored normalized{untied}"
