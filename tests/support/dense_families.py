"""What each model family differs in from the LLaMA of `dense.py`, in plain torch from the formulas.

A class here overrides the pieces that the family changes. `dense_family` puts a method's reference on top of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.support.dense import DenseLlama

GRANITE = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.25,
    "logits_scaling": 8.0,
}


class Qwen3(DenseLlama):
    """Queries and keys of each head are normalized."""

    def queries_and_keys(self, q: torch.Tensor, k: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        module = f"model.layers.{layer}.self_attn"
        return super().queries_and_keys(self.norm(q, f"{module}.q_norm"), self.norm(k, f"{module}.k_norm"), layer)


class Granite(DenseLlama):
    """Four factors: of the embedding, of the branches, of the scores and of the logits."""

    def start_of_stream(self, ids: torch.Tensor) -> torch.Tensor:
        return GRANITE["embedding_multiplier"] * super().start_of_stream(ids)

    def attention(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return GRANITE["residual_multiplier"] * super().attention(x, layer)

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        return GRANITE["residual_multiplier"] * super().mlp(x, layer)

    def queries_and_keys(self, q: torch.Tensor, k: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give queries the factor that makes 1 / sqrt(head_dim) the multiplier."""
        q, k = super().queries_and_keys(q, k, layer)
        return GRANITE["attention_multiplier"] * self.settings.head_dim**0.5 * q, k

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().logits(hidden) / GRANITE["logits_scaling"]


class Olmo2(DenseLlama):
    """Norms after the sub-layers, and of all queries and all keys at once."""

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.start_of_stream(ids)
        for layer in range(self.settings.layers):
            block = f"model.layers.{layer}"
            x = x + self.norm(self.attention(x, layer), f"{block}.post_attention_layernorm")
            x = x + self.norm(self.mlp(x, layer), f"{block}.post_feedforward_layernorm")
            self.after_block(x, layer)
        return self.norm(x, "model.norm")

    def queries_and_keys(self, q: torch.Tensor, k: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        def normed(heads: torch.Tensor, name: str) -> torch.Tensor:
            flat = heads.transpose(1, 2).flatten(2)
            flat = self.norm(flat, f"model.layers.{layer}.self_attn.{name}")
            return flat.unflatten(2, (heads.shape[1], -1)).transpose(1, 2)

        return super().queries_and_keys(normed(q, "q_norm"), normed(k, "k_norm"), layer)


class Arcee(DenseLlama):
    """An ungated MLP, here with GELU."""

    def mlp(self, x: torch.Tensor, layer: int) -> torch.Tensor:
        module = f"model.layers.{layer}.mlp"
        return self.linear(F.gelu(self.linear(x, f"{module}.up_proj")), f"{module}.down_proj")


# By family: the keys of the model section besides the usual sizes, and the class.
DENSE_FAMILIES: dict[str, tuple[dict[str, Any], type[DenseLlama]]] = {
    "arcee": ({"hidden_act": "gelu"}, Arcee),
    "granite": (GRANITE, Granite),
    "mistral": ({"head_dim": 8}, DenseLlama),
    "olmo2": ({}, Olmo2),
    "qwen2": ({}, DenseLlama),
    "qwen3": ({"head_dim": 8, "attention_bias": True}, Qwen3),
}


def dense_family(family: str, of_method: type[DenseLlama]) -> type[DenseLlama]:
    """Return the reference of a method in a model of a family: the method's pieces, then the family's, then LLaMA's."""
    of_family = DENSE_FAMILIES[family][1]
    return of_family if of_method is DenseLlama else type("Reference", (of_method, of_family), {})
